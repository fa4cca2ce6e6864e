"""Writing every format that we write, reading it back by others and by us, bit by bit."""

import io
import pickle
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing, parallel_state
from transformers import AutoModelForCausalLM

from megatron_distkv.errors import CheckpointError
from megatron_distkv.model import build_gpt, init_tensor_parallel
from megatron_distkv.model.families import family_of
from megatron_distkv.model.weights import (
    CheckpointFormat,
    find_checkpoint,
    load_weights,
    open_source,
    torch_dist,
    write_checkpoint,
)
from megatron_distkv.model.weights.hf_writer import write_hf
from megatron_distkv.model.weights.safe_load import load_index
from tests.model.families import FAMILIES, save_family
from tests.model.newest_megatron import as_megatron_0_19_writes
from tests.model.tensors import assert_same_bits, safetensors, whole_tensors
from tests.model.zero3 import save_zero3


def convert(source: Path, target: Path, to: str, tp: int = 1) -> Path:
    checkpoint = find_checkpoint(source)
    opened = open_source(checkpoint, checkpoint.model)
    write_checkpoint(opened, checkpoint.model, CheckpointFormat(to), target, iteration=3, tensor_parallel=tp)
    return target


def logits(path: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    with torch.no_grad():
        return model(torch.arange(60)[None] % 131).logits


@pytest.mark.parametrize("name", list(FAMILIES))
def test_through_torch_dist_of_two_legacy_of_four_and_zero3_of_three_changes_no_bit(name: str, tmp_path: Path) -> None:
    # Given a model of four KV heads, so that four ranks can have one each
    source = save_family(name, tmp_path / "hf", num_key_value_heads=4)
    # When it goes through both of Megatron's formats, and DeepSpeed's files, and back
    dist = convert(source, tmp_path / "dist", "torch_dist", tp=2)
    legacy = convert(dist, tmp_path / "legacy", "legacy", tp=4)
    zero3 = save_zero3(tmp_path / "zero3", legacy, num_ranks=3)
    back = convert(zero3, tmp_path / "back", "hf")
    # Then each says what it is, and all tensors are what they were
    family = family_of(find_checkpoint(source).model).name
    assert str(find_checkpoint(legacy)).endswith(f"({family}, TP 4, PP 1, step 3)")
    assert str(find_checkpoint(dist)).endswith(f"({family}, TP 2, PP 1, step 3)")
    assert_same_bits(safetensors(source), safetensors(back))
    # And transformers computes the same from its own and from our directory
    assert torch.equal(logits(source), logits(back))
    assert find_checkpoint(back).model == find_checkpoint(source).model


def test_bf16_and_many_files(tmp_path: Path) -> None:
    source = save_family("qwen3", tmp_path / "hf", dtype=torch.bfloat16, shard="30KB")
    checkpoint = find_checkpoint(source)
    opened = open_source(checkpoint, checkpoint.model)
    write_hf(opened, checkpoint.model, torch.bfloat16, tmp_path / "back", max_file_bytes=30_000)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 3
    assert_same_bits(safetensors(source), safetensors(tmp_path / "back"))
    AutoModelForCausalLM.from_pretrained(tmp_path / "back")


@pytest.mark.parametrize(("name", "tp"), [("qwen3", 1), ("qwen3", 2), ("mixtral", 2), ("gemma3", 2)])
def test_megatrons_own_loader_reads_what_we_write(name: str, tp: int, tmp_path: Path) -> None:
    # Given torch_dist pieces of one and of two ranks
    source = save_family(name, tmp_path / "hf")
    path = find_checkpoint(convert(source, tmp_path / "dist", "torch_dist", tp=tp))
    # When Megatron-core's stock strategy loads them
    gpt = build_gpt(path.model, init_tensor_parallel(1))
    groups = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    state = dist_checkpointing.load(gpt.sharded_state_dict(metadata=groups), str(path.directory))
    gpt.load_state_dict(state, strict=False)
    # Then the model holds the tensors
    assert_same_bits({name: x.detach() for name, x in gpt.named_parameters()}, reordered(whole_tensors(source), gpt))


@pytest.mark.parametrize("name", ["qwen3-moe", "gemma2"])
def test_what_megatron_itself_saved_is_read(name: str, tmp_path: Path) -> None:
    # Given a mixture, or norms where Megatron has none, saved by Megatron's sharded state dict
    source = save_family(name, tmp_path / "hf")
    checkpoint = find_checkpoint(source)
    gpt = build_gpt(checkpoint.model, init_tensor_parallel(1))
    load_weights(gpt, checkpoint, checkpoint.model)
    torch_dist.save(gpt, checkpoint.model, tmp_path / "dist", iteration=1)
    # Then we know its shape and its tensors
    assert find_checkpoint(tmp_path / "dist").model == checkpoint.model
    assert_same_bits(whole_tensors(source), whole_tensors(tmp_path / "dist"))


@pytest.mark.parametrize("saved_twice", [False, True])
def test_a_checkpoint_without_common_pt_is_read(saved_twice: bool, tmp_path: Path) -> None:
    source = save_family("qwen3", tmp_path / "hf")
    directory = find_checkpoint(convert(source, tmp_path / "dist", "torch_dist", tp=2)).directory
    as_megatron_0_19_writes(directory, saved_twice=saved_twice)
    found = find_checkpoint(tmp_path / "dist")
    assert found.model == find_checkpoint(source).model
    assert found.parallelism == "TP 2, PP 1"
    assert_same_bits(whole_tensors(source), whole_tensors(tmp_path / "dist"))


@pytest.mark.parametrize("common", [{}, "no mapping"])
def test_a_common_state_that_holds_no_args_is_named(common: object, tmp_path: Path) -> None:
    directory = find_checkpoint(
        convert(save_family("llama", tmp_path / "hf"), tmp_path / "dist", "torch_dist")
    ).directory
    as_megatron_0_19_writes(directory, common=common)
    with pytest.raises(CheckpointError, match=r"\.distcp.*(holds no args|common_state)"):
        find_checkpoint(directory)


def test_an_index_is_read_on_every_python(tmp_path: Path) -> None:
    # Given an index as Python 3.13 pickles it: paths are of a module that no other has
    source = save_family("llama", tmp_path / "hf")
    path = find_checkpoint(convert(source, tmp_path / "dist", "torch_dist")).directory / ".metadata"
    index = load_index(path)
    # Ours names no class of paths at all, so that torch and Megatron of any Python read it
    assert b"PosixPath" not in path.read_bytes()
    index.storage_meta.checkpoint_id = path.parent
    new = b"cpathlib._local\n"  # in the file itself: Python 3.13's own name for it
    foreign = pickle.dumps(index, protocol=2).replace(b"cpathlib\n", new)
    assert new + b"PosixPath" in foreign
    path.write_bytes(foreign)
    # Then it is read
    assert load_index(path).storage_meta.checkpoint_id == path.parent
    assert_same_bits(whole_tensors(source), whole_tensors(path.parent))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_sees_how_far_loading_and_writing_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_family("llama", tmp_path / "hf")
    for what, to in (("writing", "torch_dist"), ("rank 1 of 2", "legacy"), ("file 1 of 1", "hf")):
        monkeypatch.setattr(sys, "stderr", terminal := Terminal())
        convert(source, tmp_path / to, to, tp=1 if to == "hf" else 2)
        assert f"\r{what}:" in terminal.getvalue()
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    checkpoint = find_checkpoint(tmp_path / "legacy")
    load_weights(build_gpt(checkpoint.model, init_tensor_parallel(1)), checkpoint, checkpoint.model)
    assert "\rloading:   0%" in terminal.getvalue()


def test_transformer_engines_names_of_grouped_experts_are_read(tmp_path: Path) -> None:
    source = save_family("mixtral", tmp_path / "hf")
    folder = convert(source, tmp_path / "legacy", "legacy", tp=2)
    for file in folder.rglob("*.pt"):
        state = torch.load(file, weights_only=False)
        grouped = {
            re.sub(r"local_experts\.(\d+)\.(linear_fc[12]\.weight)", r"\2\1", name): tensor
            for name, tensor in state["model"].items()
        }
        assert "decoder.layers.1.mlp.experts.linear_fc2.weight3" in grouped
        torch.save({**state, "model": grouped}, file)
    assert_same_bits(whole_tensors(source), whole_tensors(folder))


def reordered(tensors: dict[str, torch.Tensor], gpt: Any) -> dict[str, torch.Tensor]:
    return {name: tensors[name] for name, _ in gpt.named_parameters()}
