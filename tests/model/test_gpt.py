"""Megatron's GPTModel with DistAttention against transformers' Llama, over real process groups and real checkpoints."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_distkv.errors import CheckpointError, ConfigError
from megatron_distkv.model import find_checkpoint
from tests.model.llamas import save_llama

SCRIPT = Path(__file__).with_name("run_llama.py")
VARIANTS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha, tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "mqa": {"num_key_value_heads": 1},
}


def run(checkpoint: Path, tp: int, out: Path, **options: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={tp}", str(SCRIPT)]
    extra = [f"{key}={value}" for key, value in options.items()]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [*command, str(checkpoint), str(tp), str(out), *extra], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, float] = json.loads(out.read_text())
    assert result["largest_logit"] > 1, "the reference must be worth comparing with"
    return result


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_logits_equal_llamas_on_one_rank(variant: str, tmp_path: Path) -> None:
    result = run(save_llama(tmp_path / "hf", shard="50KB", **VARIANTS[variant]), 1, tmp_path / "out")
    assert result["dense"] < 1e-4
    assert result["packed"] < 1e-4


def test_two_ranks_and_both_checkpoint_formats_any_to_any(tmp_path: Path) -> None:
    # Given a Hugging Face checkpoint, read by two ranks and saved as torch_dist
    hf = save_llama(tmp_path / "hf")
    two = run(hf, 2, tmp_path / "out", save=tmp_path / "mcore2")
    # When one rank reads that, and saves it again for two
    one = run(hf, 1, tmp_path / "out", load=tmp_path / "mcore2", save=tmp_path / "mcore1")
    again = run(hf, 2, tmp_path / "out", load=tmp_path / "mcore1")
    # Then all of them give Llama's logits
    for result in (two, one, again):
        assert result["dense"] < 1e-4
        assert result["packed"] < 1e-4
    assert find_checkpoint(tmp_path / "mcore1").step == 7
    assert find_checkpoint(tmp_path / "mcore1").model == find_checkpoint(hf).model


def test_bf16_is_as_close_as_bf16_can_be(tmp_path: Path) -> None:
    result = run(save_llama(tmp_path / "hf", dtype=torch.bfloat16), 1, tmp_path / "out")
    assert result["packed"] < 0.05 * result["largest_logit"]


def broken(tmp_path: Path, **changes: Any) -> Path:
    directory = save_llama(tmp_path / "hf")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **changes}))
    return directory


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"architectures": ["OpaqueForCausalLM"]}, "OpaqueForCausalLM is not supported"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1.0}}, "RoPE scaling 'dynamic'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"num_key_value_heads": 3}, "multiple of num_kv_heads"),
    ],
)
def test_a_model_that_we_lack_is_one_sentence(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises((CheckpointError, ConfigError), match=sentence) as caught:
        find_checkpoint(broken(tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_a_missing_directory_and_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        find_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        find_checkpoint(tmp_path)


def load_on_one_rank(directory: Path) -> subprocess.CompletedProcess[str]:
    code = (
        "import sys; from pathlib import Path; from megatron_distkv.model import *\n"
        "c = find_checkpoint(Path(sys.argv[1])); m = build_gpt(c.model, init_tensor_parallel(1))\n"
        "load_weights(m, c, c.model)"
    )
    return subprocess.run([sys.executable, "-c", code, str(directory)], capture_output=True, text=True, check=False)


def test_a_checkpoint_of_another_shape_and_a_truncated_one_name_file_and_tensor(tmp_path: Path) -> None:
    other = load_on_one_rank(broken(tmp_path, hidden_size=32, head_dim=16))
    assert "embed_tokens.weight has shape (131, 64), the model needs (131, 32)" in other.stderr
    file = tmp_path / "hf" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert "cannot be read" in load_on_one_rank(tmp_path / "hf").stderr
