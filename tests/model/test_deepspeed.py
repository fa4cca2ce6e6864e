"""Checkpoints that DeepSpeed itself wrote after real steps, on two ranks, against what Megatron's own way saved."""

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_distkv.errors import CheckpointError
from megatron_distkv.model.families import family_of
from megatron_distkv.model.weights import CheckpointFormat, find_checkpoint, open_source, write_checkpoint
from megatron_distkv.model.weights.parameters import model_parameters
from megatron_distkv.model.weights.source import rank_part
from tests.model.families import save_family
from tests.model.tensors import assert_same_bits, safetensors, whole_tensors

SCRIPT, FORK_RANKS = (Path(__file__).with_name(name) for name in ("run_deepspeed.py", "fork_ranks.py"))


def train(source: Path | str, tp: int, dtype: str, folder: Path, *stages: int, steps: int = 2, ranks: int = 2) -> Path:
    command = [sys.executable, str(FORK_RANKS), str(ranks), str(SCRIPT)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": os.getcwd()}
    arguments = [str(source), str(tp), dtype, str(folder), str(steps), *map(str, stages)]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """fp32 on two tensor ranks, and bf16 (with fp32 masters) on two data ranks."""
    folder = tmp_path_factory.mktemp("deepspeed")
    return {
        "tp2": train(save_family("qwen3", folder / "qwen3"), 2, "fp32", folder / "tp2", 0, 1, 2, 3),
        "dp2": train(save_family("qwen2-tied", folder / "qwen2"), 1, "bf16", folder / "dp2", 1, 2, 3),
    }


CASES = [("tp2", 0), ("tp2", 1), ("tp2", 2), ("tp2", 3), ("dp2", 1), ("dp2", 2), ("dp2", 3)]


@pytest.mark.parametrize(("layout", "stage"), CASES)
def test_every_stage_holds_the_weights_that_megatron_saved(layout: str, stage: int, runs: dict[str, Path]) -> None:
    out = runs[layout] / f"zero{stage}"
    # Given what both ways of saving left after the same two steps
    found, expected = find_checkpoint(out / "deepspeed"), find_checkpoint(out)
    assert (found.format.value, expected.format.value) == ("deepspeed", "torch_dist")
    assert found.model == expected.model
    # Then it is known how it was written, and the weights are the same
    ranks = "TP 2, DP 1" if layout == "tp2" else "TP 1, DP 2"
    assert str(found).endswith(f"global_step2 ({family_of(found.model).name}, {ranks}, ZeRO {stage}, step 2)")
    ours, theirs = whole_tensors(out / "deepspeed"), whole_tensors(out)
    if (layout, stage) == ("dp2", 3):  # only fp32 masters are there: rounding them gives what was saved
        ours = {name: tensor.to(torch.bfloat16) for name, tensor in ours.items()}
    assert_same_bits(ours, theirs)


def convert(source: Path, target: Path, to: str, tp: int = 1) -> Path:
    checkpoint = find_checkpoint(source)
    opened = open_source(checkpoint, checkpoint.model)
    write_checkpoint(opened, checkpoint.model, CheckpointFormat(to), target, tensor_parallel=tp)
    return target


def test_through_all_four_formats_and_back_no_bit_changes(tmp_path: Path) -> None:
    # Given models that have gone from Hugging Face to torch_dist of two ranks to Megatron legacy of four
    names = ("qwen2", "gemma3", "mixtral")
    for name in names:
        source = save_family(name, tmp_path / "hf" / name, num_key_value_heads=4)
        dist = convert(source, tmp_path / "dist" / name, "torch_dist", tp=2)
        convert(dist, tmp_path / "legacy" / name, "legacy", tp=4)
    # When DeepSpeed takes them over on two tensor by two data ranks, saves before any step, and that becomes Hugging
    # Face's again
    legacies = ",".join(str(tmp_path / "legacy" / name) for name in names)
    runs = train(legacies, 2, "fp32", tmp_path / "runs", 1, 3, steps=0, ranks=4)
    for name, stage in itertools.product(names, (1, 3)):
        saved = runs / name / f"zero{stage}" / "deepspeed"
        assert f"TP 2, DP 2, ZeRO {stage}" in str(find_checkpoint(saved))
        back = convert(saved, tmp_path / "back" / f"{name}{stage}", "hf")
        # Then they are the same, bit by bit
        assert_same_bits(safetensors(tmp_path / "hf" / name), safetensors(back))


@pytest.mark.parametrize(("layout", "stage"), [("tp2", 2), ("tp2", 3), ("dp2", 2)])
def test_any_ranks_checkpoints_give_any_number_of_ranks_their_parts(
    layout: str, stage: int, runs: dict[str, Path]
) -> None:
    out = runs[layout] / f"zero{stage}"
    found, expected = find_checkpoint(out / "deepspeed"), find_checkpoint(out)
    ours, theirs = open_source(found, found.model), open_source(expected, expected.model)
    for size in (1, 2):
        for parameter in model_parameters(found.model):
            for rank in range(size):
                assert torch.equal(rank_part(ours, parameter, rank, size), rank_part(theirs, parameter, rank, size))


def test_training_has_changed_the_weights(runs: dict[str, Path]) -> None:
    """Otherwise none of the above would show that trained weights are read."""
    before, after = whole_tensors(runs["tp2"].parent / "qwen3"), whole_tensors(runs["tp2"] / "zero3" / "deepspeed")
    assert all(not torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("stage", "file", "sentence"),
    [
        (1, "mp_rank_01_model_states.pt", "mp_rank_01_model_states.pt is missing"),
        (3, "zero_pp_rank_0_mp_rank_01_model_states.pt", "zero_pp_rank_0_mp_rank_01_model_states.pt is missing"),
        (3, "zero_pp_rank_0_mp_rank_00_optim_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt is missing"),
    ],
)
def test_a_missing_file_is_named(stage: int, file: str, sentence: str, runs: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(runs["tp2"] / f"zero{stage}", tmp_path / "run")
    (tmp_path / "run" / "deepspeed" / "global_step2" / file).unlink()
    with pytest.raises(CheckpointError, match=sentence) as caught:
        whole_tensors(tmp_path / "run" / "deepspeed")
    assert "\n" not in str(caught.value)


def test_without_a_shape_anywhere_that_is_said(runs: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(runs["tp2"] / "zero1" / "deepspeed", tmp_path / "far" / "away" / "deepspeed")
    with pytest.raises(CheckpointError, match="the model's shape is unknown"):
        find_checkpoint(tmp_path / "far" / "away" / "deepspeed")
