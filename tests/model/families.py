"""One small random model of every family that can be served, saved by transformers itself."""

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

_SIZES: dict[str, Any] = {
    "vocab_size": 131, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5, "max_position_embeddings": 2048, "eos_token_id": 2,
    "bos_token_id": 1, "tie_word_embeddings": False, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
}  # fmt: skip
# Placed so that within 50 positions some dims are stretched fully, some on the ramp, some not at all.
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}  # fmt: skip
_YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 512}
# As Qwen's model cards say: beside a max_position_embeddings that stays what it was.
_YARN_CARD = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 32}
_YARN_OTHERS = {
    "rope_type": "yarn", "rope_theta": 500.0, "factor": 2.0, "original_max_position_embeddings": 64, "beta_fast": 8.0,
    "beta_slow": 0.5, "truncate": False, "mscale": 0.707, "mscale_all_dim": 1.2,
}  # fmt: skip
_LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}


_GEMMA3_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 8.0},
}


def _make(kind: type[PretrainedConfig], **changes: Any) -> PretrainedConfig:
    return kind(**{**_SIZES, **changes})


FAMILIES: dict[str, PretrainedConfig] = {
    "llama": _make(LlamaConfig),
    "llama3": _make(LlamaConfig, rope_parameters=_LLAMA3),
    "llama3-tied": _make(LlamaConfig, rope_parameters=_LLAMA3, tie_word_embeddings=True),
    "llama-linear": _make(LlamaConfig, rope_parameters=_LINEAR),
    "llama-yarn": _make(LlamaConfig, rope_parameters=_YARN_OTHERS),
    "mistral": _make(MistralConfig, sliding_window=None),
    "mistral-window": _make(MistralConfig, sliding_window=11),
    "qwen2": _make(Qwen2Config),
    "qwen2-window": _make(Qwen2Config, use_sliding_window=True, sliding_window=9, max_window_layers=1),
    "qwen2-tied": _make(Qwen2Config, tie_word_embeddings=True, num_key_value_heads=4),
    "qwen2-yarn": _make(Qwen2Config, rope_parameters=_YARN_CARD, max_position_embeddings=32),
    "qwen3": _make(Qwen3Config, head_dim=32),
    "qwen3-yarn": _make(Qwen3Config, rope_parameters=_YARN),
    "gemma2": _make(
        Gemma2Config,
        head_dim=32,
        sliding_window=10,
        query_pre_attn_scalar=24,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=4.0,
        tie_word_embeddings=True,
        hidden_activation="gelu_pytorch_tanh",
    ),
    "gemma3": _make(
        Gemma3TextConfig,
        num_hidden_layers=3,
        sliding_window=10,
        query_pre_attn_scalar=24,
        tie_word_embeddings=True,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters=_GEMMA3_ROPE,
    ),
    "mixtral": _make(MixtralConfig, num_local_experts=4, num_experts_per_tok=2, sliding_window=13),
    "qwen3-moe": _make(
        Qwen3MoeConfig, moe_intermediate_size=32, num_experts=8, num_experts_per_tok=3, norm_topk_prob=True
    ),
    "qwen3-moe-shares": _make(
        Qwen3MoeConfig,
        moe_intermediate_size=32,
        num_experts=8,
        num_experts_per_tok=3,
        norm_topk_prob=False,
        use_sliding_window=True,
        sliding_window=9,
    ),
}


def save_family(
    name: str, directory: Path, *, dtype: torch.dtype = torch.float32, shard: str = "5GB", **changes: Any
) -> Path:
    """Big weights and biases, so that attention and RoPE really matter."""
    torch.manual_seed(0)
    config = copy.deepcopy(FAMILIES[name])
    config.update(changes)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            is_norm = "norm" in path
            parameter.copy_(1 + 0.3 * noise if is_norm else noise * (0.15 if parameter.dim() > 1 else 0.5))
    model.to(dtype).save_pretrained(directory, max_shard_size=shard)
    return directory
