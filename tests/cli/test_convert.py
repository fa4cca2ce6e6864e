"""`distkv convert` as a user runs it: real processes, real checkpoints, bit by bit."""

import os
import resource
import subprocess
from pathlib import Path

import pytest
import torch
from megatron_distkv.launch.commands import command_line

from megatron_distkv.cli.main import main
from megatron_distkv.config.model import ModelConfig
from megatron_distkv.model import Checkpoint, build_gpt, find_checkpoint, init_tensor_parallel, load_weights
from tests.model.families import save_family
from tests.model.llamas import save_llama
from tests.model.tensors import assert_same_bits, safetensors

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def convert(*arguments: str | Path, file_limit_bytes: int = resource.RLIM_INFINITY) -> subprocess.CompletedProcess[str]:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit_bytes, file_limit_bytes))

    command = command_line("convert", *map(str, arguments))
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False, preexec_fn=limit)


def weights(checkpoint: Checkpoint, model: ModelConfig) -> dict[str, torch.Tensor]:
    """Read into a model whose random start no other call shares: a tensor that is not read shows."""
    gpt = build_gpt(model, init_tensor_parallel(1))
    load_weights(gpt, checkpoint, model)
    return dict(gpt.named_parameters())


def assert_equal_bit_by_bit(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("tied", [False, True])
def test_a_converted_llama_has_the_same_shape_and_bits(tied: bool, tmp_path: Path) -> None:
    # Given a Hugging Face checkpoint with a tokenizer
    source = save_llama(tmp_path / "hf", tie_word_embeddings=tied, num_key_value_heads=4 if tied else 2)
    (source / "tokenizer.json").write_text('{"version": "1.0"}')
    # When it is converted
    done = convert(source, tmp_path / "mcore")
    # Then the copy says what it is, without noise, and holds the same model
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "iter_0000000 (fp32, tokenizer.json" in done.stdout
    before, after = find_checkpoint(source), find_checkpoint(tmp_path / "mcore")
    assert after.format.value == "torch_dist"
    assert (after.step, after.model) == (0, before.model)
    assert_equal_bit_by_bit(weights(before, before.model), weights(after, after.model))
    assert (tmp_path / "mcore" / "tokenizer.json").read_text() == '{"version": "1.0"}'


def test_another_dtype_and_iteration_and_then_the_sources_own(tmp_path: Path) -> None:
    # Given an fp32 Llama, converted to bf16 as iteration 5
    source = save_llama(tmp_path / "hf")
    (source / "tokenizer.json").write_text("{}")
    assert main(["convert", str(source), str(tmp_path / "bf16"), "--dtype", "bf16", "--iteration", "5"]) == 0
    rounded = find_checkpoint(tmp_path / "bf16")
    assert (rounded.model.dtype, rounded.step) == ("bf16", 5)
    original = find_checkpoint(source)
    expected = {name: tensor.to(torch.bfloat16) for name, tensor in weights(original, original.model).items()}
    assert_equal_bit_by_bit(weights(rounded, rounded.model), expected)
    # When the iteration's own folder is converted back to fp32
    assert main(["convert", str(rounded.directory), str(tmp_path / "fp32"), "--dtype", "fp32"]) == 0
    # Then the iteration and the tokenizer follow, and widening has changed no value
    widened = find_checkpoint(tmp_path / "fp32")
    assert (widened.model, widened.step) == (original.model, 5)
    assert (tmp_path / "fp32" / "tokenizer.json").exists()
    assert_equal_bit_by_bit(weights(widened, widened.model), {n: t.float() for n, t in expected.items()})


def test_to_legacy_and_back_to_hugging_face(tmp_path: Path) -> None:
    # Given a Hugging Face checkpoint with a tokenizer and settings of generation
    source = save_family("qwen3", tmp_path / "hf")
    (source / "tokenizer.json").write_text("{}")
    # When it is cut for two ranks of Megatron-LM, and made whole again
    legacy = convert(source, tmp_path / "legacy", "--to", "legacy", "--tp", "2", "--iteration", "7")
    back = convert(tmp_path / "legacy", tmp_path / "back", "--to", "hf")
    # Then each command said what it found, and nothing has changed
    assert "(qwen3) ->" in legacy.stdout
    assert "legacy checkpoint" in back.stdout
    assert "(qwen3, TP 2, PP 1, step 7) ->" in back.stdout
    assert (legacy.stderr, back.stderr) == ("", "")
    assert_same_bits(safetensors(source), safetensors(tmp_path / "back"))
    assert (tmp_path / "back" / "tokenizer.json").read_text() == "{}"
    assert (tmp_path / "back" / "generation_config.json").exists()


def test_what_would_not_do_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = str(save_llama(tmp_path / "hf")), tmp_path / "mcore"
    capsys.readouterr()
    target.mkdir()
    (target / "thesis.tex").write_text("mine")
    for arguments, sentence in {
        (source, str(target)): "mcore is not empty",
        (source, str(target / "thesis.tex")): "thesis.tex is a file",
        (source, str(tmp_path / "new"), "--iteration=-1"): "must not be negative (got -1)",
        (source, str(tmp_path / "new"), "--tp=0"): "--tp must be at least 1 (got 0)",
        (source, str(tmp_path / "new"), "--tp=4"): "--tp 4 does not divide the model's KV heads (2)",
        (source, str(tmp_path / "new"), "--tp=2", "--to=hf"): "not split over ranks",
        (str(tmp_path / "nowhere"), str(tmp_path / "new")): "nowhere: the directory does not exist",
    }.items():
        assert main(["convert", *arguments]) == 2
        assert sentence in capsys.readouterr().err
    assert [path.name for path in target.iterdir()] == ["thesis.tex"]
    assert not (tmp_path / "new").exists()


def test_a_damaged_source_leaves_no_target(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save_llama(tmp_path / "hf")
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert main(["convert", str(source), str(tmp_path / "mcore")]) == 2
    assert "cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "mcore").exists()


def test_a_disk_that_is_too_small_is_one_sentence_and_no_checkpoint(tmp_path: Path) -> None:
    done = convert(save_llama(tmp_path / "hf"), tmp_path / "mcore", file_limit_bytes=100_000)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "cannot write all of" in done.stderr
    assert not (tmp_path / "mcore" / "latest_checkpointed_iteration.txt").exists()
