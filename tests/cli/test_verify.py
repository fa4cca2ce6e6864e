"""`distkv verify` as a user runs it: transformers against us, formats against each other, and models that differ."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from megatron_distkv.launch.commands import command_line
from safetensors.torch import load_file, save_file

from megatron_distkv.cli.main import main
from megatron_distkv.model.agreement import compare_logits
from megatron_distkv.model.weights import CheckpointFormat, find_checkpoint, open_source, write_checkpoint
from tests.model.families import save_family


def verify(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = command_line("verify", *map(str, arguments))
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False)


def legacy_copy(source: Path, target: Path) -> Path:
    checkpoint = find_checkpoint(source)
    opened = open_source(checkpoint, checkpoint.model)
    write_checkpoint(opened, checkpoint.model, CheckpointFormat.LEGACY, target, iteration=5, tensor_parallel=2)
    return target


def change(source: Path, name: str, index: tuple[int, ...], value: float) -> None:
    file = source / "model.safetensors"
    tensors = load_file(file)
    tensors[name][index] += value
    save_file(tensors, file, metadata={"format": "pt"})


def test_transformers_and_we_agree_on_one_checkpoint(tmp_path: Path) -> None:
    source = save_family("qwen3-yarn", tmp_path / "hf")
    done = verify(source)
    assert done.returncode == 0, done.stderr + done.stdout
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0] == f"A: hf checkpoint {source} (qwen3), computed by transformers"
    assert lines[1] == f"B: hf checkpoint {source} (qwen3), computed by us"
    assert [line.split()[:2] for line in lines[3:7]] == [[str(n), "64"] for n in (1, 2, 3, 4)]
    assert lines[-1] == "the same within 0.0001 (relative, fp32); top-1 agrees on 256 of 256 tokens"


def test_a_copy_agrees_and_one_changed_weight_is_found_where_it_first_matters(tmp_path: Path) -> None:
    # Given a model of bytes and its copy, cut for two ranks
    source = save_family("qwen2", tmp_path / "hf", vocab_size=272)
    copy = legacy_copy(source, tmp_path / "legacy")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("no such letter\n\nzebra\n")
    done = verify(source, copy, "--prompts", prompts, "--prompt", "two", "--per-token")
    assert done.returncode == 0, done.stderr + done.stdout
    assert "(qwen2, TP 2, PP 1, step 5), computed by us" in done.stdout
    assert len(done.stdout.splitlines()) == 3 + 3 + (4 + 15 + 6) + 1  # head, prompts, tokens with BOS, verdict
    # When the embedding of one letter changes in the original
    change(source, "model.embed_tokens.weight", (ord("b"), 3), 1.0)
    done = verify(source, copy, "--prompts", prompts)
    # Then the prompt with that letter differs from there on, and the other does not
    assert done.returncode == 1, done.stderr + done.stdout
    rows = done.stdout.splitlines()[3:5]
    assert rows[0].endswith("-")
    assert "token 3 (relative" in rows[1]  # BOS z e b
    assert done.stdout.splitlines()[-1].startswith("NOT the same within 0.0001")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["LEGACY"], "a legacy checkpoint by us needs another to be compared with: give B"),
        (["HF", "SMALL"], "A knows 272 tokens and B 131"),
        (["HF", "--prompt", "x" * 3000], "has 3001 tokens; the models take 2048"),
        (["HF", "--prompts", "NOWHERE"], "cannot read the prompts in"),
        (["HF", "NOWHERE"], "the directory does not exist"),
    ],
)
def test_what_cannot_be_compared_is_one_sentence(
    arguments: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = {"HF": save_family("llama", tmp_path / "hf", vocab_size=272), "NOWHERE": tmp_path / "nowhere"}
    paths["LEGACY"] = legacy_copy(paths["HF"], tmp_path / "legacy")
    paths["SMALL"] = save_family("llama", tmp_path / "small")
    capsys.readouterr()
    assert main(["verify", *(str(paths.get(argument, argument)) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert len(error.splitlines()) == 1


def test_logits_that_are_no_numbers_never_agree() -> None:
    reference = torch.ones(3, 5)
    broken = reference.clone()
    broken[1, 2] = float("nan")
    assert compare_logits(reference, broken).first_beyond(1e9) == 1
    assert compare_logits(reference, reference).first_beyond(0.0) is None
