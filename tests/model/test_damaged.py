"""Checkpoints that are hostile, damaged or of another shape: one sentence, and nothing of theirs runs."""

import io
import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_distkv.errors import CheckpointError
from megatron_distkv.model.weights import CheckpointFormat, find_checkpoint, open_source, write_checkpoint
from megatron_distkv.model.weights.safe_load import load_index
from tests.model.families import save_family
from tests.model.tensors import whole_tensors


class Bomb:
    """Unpickled by anyone who runs what a pickle names, it makes a directory."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (os.mkdir, (str(self._mark),))


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family("qwen2", tmp_path_factory.mktemp("damaged") / "hf", shard="60KB")


def written(hf: Path, target: Path, to: str) -> Path:
    """Two ranks' pieces; returns the folder of the iteration."""
    checkpoint = find_checkpoint(hf)
    source = open_source(checkpoint, checkpoint.model)
    return write_checkpoint(source, checkpoint.model, CheckpointFormat(to), target, tensor_parallel=2)


def refused(path: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        whole_tensors(path)
    sentence = str(caught.value)
    assert "\n" not in sentence
    for word in words:
        assert word in sentence, sentence


def test_the_bomb_is_live(tmp_path: Path) -> None:
    """Otherwise the tests below would show nothing."""
    torch.save(Bomb(tmp_path / "mark"), tmp_path / "file")
    torch.load(tmp_path / "file", weights_only=False)
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    ("to", "file"),
    [
        ("torch_dist", "common.pt"),
        ("legacy", "mp_rank_00/model_optim_rng.pt"),
        ("legacy", "mp_rank_01/model_optim_rng.pt"),
    ],
)
def test_a_hostile_torch_file_is_refused_and_does_not_run(to: str, file: str, hf: Path, tmp_path: Path) -> None:
    directory = written(hf, tmp_path / "out", to)
    state = torch.load(directory / file, weights_only=False)
    torch.save({**state, "extra": Bomb(tmp_path / "mark")}, directory / file)
    refused(directory, file, "posix.mkdir", "is not loaded")
    assert not (tmp_path / "mark").exists()


def test_a_hostile_deepspeed_file_is_refused_and_does_not_run(tmp_path: Path) -> None:
    (tmp_path / "latest").write_text("global_step1")
    (tmp_path / "global_step1").mkdir()
    torch.save({"module": Bomb(tmp_path / "mark")}, tmp_path / "global_step1" / "mp_rank_00_model_states.pt")
    refused(tmp_path, "mp_rank_00_model_states.pt", "is not loaded")
    assert not (tmp_path / "mark").exists()


def test_a_hostile_index_is_refused_and_does_not_run(hf: Path, tmp_path: Path) -> None:
    directory = written(hf, tmp_path / "out", "torch_dist")
    index = load_index(directory / ".metadata")
    index.planner_data = Bomb(tmp_path / "mark")
    (directory / ".metadata").write_bytes(pickle.dumps(index))
    refused(directory, ".metadata is not loaded", "posix.mkdir")
    assert not (tmp_path / "mark").exists()


def test_a_hostile_piece_is_refused_and_does_not_run(hf: Path, tmp_path: Path) -> None:
    directory = written(hf, tmp_path / "out", "torch_dist")
    index = load_index(directory / ".metadata")
    name = "decoder.final_layernorm.weight"
    place = index.storage_data[MetadataIndex(name, torch.Size([0]))]
    bomb = io.BytesIO()
    torch.save(Bomb(tmp_path / "mark"), bomb)
    file = directory / place.relative_path
    place.offset, place.length = file.stat().st_size, len(bomb.getvalue())
    file.write_bytes(file.read_bytes() + bomb.getvalue())
    (directory / ".metadata").write_bytes(pickle.dumps(index))
    refused(directory, name, place.relative_path)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    ("to", "file"),
    [
        ("torch_dist", ".metadata"),
        ("torch_dist", "common.pt"),
        ("torch_dist", "__0_0.distcp"),
        ("legacy", "mp_rank_01/model_optim_rng.pt"),
    ],
)
def test_a_truncated_file_is_named(to: str, file: str, hf: Path, tmp_path: Path) -> None:
    directory = written(hf, tmp_path / "out", to)
    path = directory / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    refused(directory, file)


def test_a_truncated_safetensors_file_is_named(hf: Path, tmp_path: Path) -> None:
    directory = save_family("qwen2", tmp_path / "hf", shard="60KB")
    file = directory / "model-00002-of-00006.safetensors"
    file = sorted(directory.glob("*.safetensors"))[1] if not file.exists() else file
    file.write_bytes(file.read_bytes()[:-100])
    refused(directory, file.name, "cannot be read")


def test_a_missing_file_of_an_index_is_named(hf: Path, tmp_path: Path) -> None:
    directory = save_family("qwen2", tmp_path / "hf", shard="60KB")
    file = sorted(directory.glob("*.safetensors"))[1]
    file.unlink()
    refused(directory, file.name, "cannot be read")


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    directory = save_family("qwen2", tmp_path / "hf")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3, "layer_types": None}))
    refused(directory, "model.layers.2.input_layernorm.weight is missing")
    (directory / "config.json").write_text(json.dumps({**config, "architectures": ["Qwen3ForCausalLM"]}))
    refused(directory, "model.layers.0.self_attn.q_norm.weight is missing")


def test_an_index_that_names_files_elsewhere_stays_in_its_directory(tmp_path: Path) -> None:
    directory = save_family("qwen2", tmp_path / "hf")
    (directory / "model.safetensors").rename(tmp_path / "secret.safetensors")
    index = {"weight_map": {"model.norm.weight": "../secret.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(directory, "hf/secret.safetensors cannot be read")


def test_a_lost_piece_and_a_piece_of_another_shape_are_named(hf: Path, tmp_path: Path) -> None:
    directory = written(hf, tmp_path / "out", "torch_dist")
    index = load_index(directory / ".metadata")
    key = "decoder.layers.mlp.linear_fc1.weight"
    chunk = index.state_dict_metadata[key].chunks.pop()
    (directory / ".metadata").write_bytes(pickle.dumps(index))
    refused(directory, key, "pieces missing")
    index.state_dict_metadata[key].chunks.append(chunk)
    del index.storage_data[MetadataIndex(key, chunk.offsets)]
    (directory / ".metadata").write_bytes(pickle.dumps(index))
    refused(directory, key, "no file is named")


def test_a_header_that_lies_about_a_tensor_is_named(tmp_path: Path) -> None:
    directory = save_family("qwen2", tmp_path / "hf")
    file = directory / "model.safetensors"
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    header["model.norm.weight"]["shape"] = [32, 2]
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    refused(directory, "model.norm.weight has shape (32, 2), the model needs (64,)")
