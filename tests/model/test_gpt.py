"""Megatron's GPTModel with DistAttention against transformers' Llama, over real process groups and real checkpoints."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_distkv.config.model import ModelConfig
from megatron_distkv.errors import CheckpointError, ConfigError
from megatron_distkv.model import build_gpt, find_checkpoint, init_tensor_parallel, load_weights
from megatron_distkv.model.weights import torch_dist
from tests.model.against_hf import Errors, compare
from tests.model.llamas import save_llama

SCRIPT, FORK_RANKS = (Path(__file__).with_name(name) for name in ("run_llama.py", "fork_ranks.py"))
VARIANTS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha, tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "mqa": {"num_key_value_heads": 1},
}


def on_one_rank(reference: Path, load: Path, save: Path | None = None) -> Errors:
    checkpoint = find_checkpoint(load)
    parallel = init_tensor_parallel(1)
    module = build_gpt(checkpoint.model, parallel)
    load_weights(module, checkpoint, checkpoint.model)
    if save is not None:
        torch_dist.save(module, checkpoint.model, save, iteration=7)
    return compare(module, checkpoint.model, parallel, reference)


def on_two_ranks(reference: Path, out: Path, **options: Path) -> Errors:
    command = [sys.executable, str(FORK_RANKS), "2", str(SCRIPT), str(reference), "2", str(out)]
    extra = [f"{key}={value}" for key, value in options.items()]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": os.getcwd()}
    done = subprocess.run([*command, *extra], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return Errors(*json.loads(out.read_text()))


def assert_llamas(errors: Errors) -> None:
    assert errors.largest_logit > 1, "the reference must be worth comparing with"
    assert max(errors.dense, errors.packed) < 1e-4


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_logits_equal_llamas_on_one_rank(variant: str, tmp_path: Path) -> None:
    hf = save_llama(tmp_path / "hf", shard="50KB", **VARIANTS[variant])
    assert_llamas(on_one_rank(hf, hf))


def test_two_ranks_and_both_checkpoint_formats_any_to_any(tmp_path: Path) -> None:
    # Given a Hugging Face checkpoint, read by two ranks and saved as torch_dist
    hf = save_llama(tmp_path / "hf")
    two = on_two_ranks(hf, tmp_path / "out", save=tmp_path / "mcore2")
    # When one rank reads that, and saves it again for two
    one = on_one_rank(hf, tmp_path / "mcore2", save=tmp_path / "mcore1")
    again = on_two_ranks(hf, tmp_path / "out", load=tmp_path / "mcore1")
    # Then all of them give Llama's logits
    for errors in (two, one, again):
        assert_llamas(errors)
    assert find_checkpoint(tmp_path / "mcore1").step == 7
    assert find_checkpoint(tmp_path / "mcore1").model == find_checkpoint(hf).model


def test_bf16_is_as_close_as_bf16_can_be(tmp_path: Path) -> None:
    hf = save_llama(tmp_path / "hf", dtype=torch.bfloat16)
    errors = on_one_rank(hf, hf)
    assert errors.largest_logit > 1
    assert errors.packed < 0.05 * errors.largest_logit


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


def test_a_checkpoint_of_another_shape_and_a_truncated_one_name_file_and_tensor(tmp_path: Path) -> None:
    other = broken(tmp_path, hidden_size=32, head_dim=16)
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight has shape \(131, 64\), .* needs \(131, 32\)"):
        on_one_rank(other, other)
    file = tmp_path / "hf" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="cannot be read"):
        on_one_rank(other, other)


def test_a_deprecation_that_is_ours_to_mend_is_not_told_to_users(caplog: pytest.LogCaptureFixture) -> None:
    """Megatron-core 0.19 logs of each GPTModel that it is deprecated."""
    config = ModelConfig(
        num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=1, num_kv_heads=1, head_dim=8, vocab_size=8
    )
    build_gpt(config, init_tensor_parallel(1))
    assert "DEPRECATED" not in caplog.text
