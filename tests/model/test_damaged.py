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
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_distkv.errors import CheckpointError
from megatron_distkv.model.weights import CheckpointFormat, find_checkpoint, open_source, write_checkpoint
from megatron_distkv.model.weights.safe_load import load_index
from tests.model.families import save_family
from tests.model.newest_megatron import as_megatron_0_19_writes
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


def test_a_hostile_common_state_is_refused_and_does_not_run(hf: Path, tmp_path: Path) -> None:
    directory = written(hf, tmp_path / "out", "torch_dist")
    state = torch.load(directory / "common.pt", weights_only=False)
    as_megatron_0_19_writes(directory, common={**state, "extra": Bomb(tmp_path / "mark")})
    refused(directory, ".distcp", "common_state", "posix.mkdir")
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


def deepspeed_files(folder: Path, stage: int) -> Path:
    """As `save_checkpoint` leaves them of one rank, with the embedding alone (real ones: test_deepspeed.py)."""
    weights = {"embedding.word_embeddings.weight": torch.ones(131, 64)}
    (folder / "global_step1").mkdir(parents=True)
    (folder / "latest").write_text("global_step1")
    shape = {"num_layers": 1, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "num_kv_heads": 2,
             "head_dim": 16, "vocab_size": 131}  # fmt: skip
    state = {"model": shape, "module": weights, "mp_world_size": 1, "dp_world_size": 1,
             "param_shapes": [{name: x.shape for name, x in weights.items()}]}  # fmt: skip
    if stage == 3:
        flat = {"optimizer_state_dict": {"fp32_flat_groups": [torch.ones(131 * 64)]}}
        torch.save(flat, folder / "global_step1" / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    prefix = "zero_pp_rank_0_" if stage == 3 else ""
    torch.save(state, folder / "global_step1" / f"{prefix}mp_rank_00_model_states.pt")
    return folder


@pytest.mark.parametrize(
    ("stage", "file"), [(1, "mp_rank_00_model_states.pt"), (3, "mp_rank_00_model_states.pt"), (3, "optim_states.pt")]
)
def test_damaged_deepspeed_files_are_named(stage: int, file: str, tmp_path: Path) -> None:
    # Given files with one tensor: the first that is missing is named
    directory = deepspeed_files(tmp_path / "run", stage)
    refused(directory, "global_step1", "decoder.layers.0.input_layernorm.weight is missing")
    [path] = directory.glob(f"global_step1/*{file}")
    whole = path.read_bytes()
    # When one of them is cut short, or hostile, it is named
    path.write_bytes(whole[: len(whole) * 2 // 3])
    refused(directory, path.name, "damaged")
    torch.save(Bomb(tmp_path / "mark"), path)
    refused(directory, path.name, "is not loaded")
    assert not (tmp_path / "mark").exists()


def test_a_deepspeed_tensor_of_another_shape_is_named_with_its_file(tmp_path: Path) -> None:
    directory = deepspeed_files(tmp_path / "run", 1)
    [path] = directory.glob("global_step1/*.pt")
    state = torch.load(path, weights_only=False)
    torch.save({**state, "module": {"embedding.word_embeddings.weight": torch.ones(131, 32)}}, path)
    refused(
        directory, path.name, "embedding.word_embeddings.weight has shape (131, 32), one of 1 ranks needs (131, 64)"
    )


def test_a_torch_dist_tensor_of_another_shape_is_named(hf: Path, tmp_path: Path) -> None:
    directory = written(hf, tmp_path / "out", "torch_dist")
    state = torch.load(directory / "common.pt", weights_only=False)
    state["args"].ffn_hidden_size = 48
    torch.save(state, directory / "common.pt")
    refused(directory, "decoder.layers.mlp.linear_fc1.weight has shape (2, 192, 64), the model needs (2, 96, 64)")


@pytest.mark.parametrize("to", ["hf", "torch_dist", "legacy"])
def test_weights_of_integers_are_refused_not_taken_for_numbers(to: str, hf: Path, tmp_path: Path) -> None:
    """Quantised weights: without their scales they would load, and compute nonsense."""
    name = "decoder.final_layernorm.weight"
    if to == "hf":
        directory, name = save_family("qwen2", tmp_path / "hf"), "model.norm.weight"
        tensors = load_file(directory / "model.safetensors")
        tensors[name] = tensors[name].to(torch.int8)
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    elif to == "legacy":
        directory = written(hf, tmp_path / "out", to)
        path = directory / "mp_rank_00/model_optim_rng.pt"
        state = torch.load(path, weights_only=False)
        state["model"][name] = state["model"][name].to(torch.int8)
        torch.save(state, path)
    else:
        directory = written(hf, tmp_path / "out", to)
        index = load_index(directory / ".metadata")
        index.state_dict_metadata[name].properties.dtype = torch.int8
        (directory / ".metadata").write_bytes(pickle.dumps(index))
    refused(directory, name, "is int8; only fp32")


def test_weights_that_are_not_safetensors_are_named(tmp_path: Path) -> None:
    directory = save_family("qwen2", tmp_path / "hf")
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    refused(directory, "pytorch_model.bin is not read: only safetensors are")


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
