"""Hugging Face's config.json to a ModelConfig and back."""

import json
import math
from pathlib import Path
from typing import Any

from megatron_distkv.config.base import parse_config
from megatron_distkv.config.model import Family, MixtureConfig, ModelConfig, RopeScaling
from megatron_distkv.errors import CheckpointError
from megatron_distkv.model.weights import hf_gemma, hf_windows
from megatron_distkv.model.weights.hf_gemma import GEMMAS

# What has RMSNorm, SwiGLU and rotate-half RoPE, and differs in ways that ModelConfig can say.
_FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "MixtralForCausalLM": "mixtral",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3_text",
}
_ARCHITECTURES = {family: architecture for architecture, family in _FAMILIES.items()}
# What well-known others need beyond that.
_LACKING = {
    "GemmaForCausalLM": "norms of 1 + weight without the norms after each part that Gemma 2 has",
    "Gemma3ForConditionalGeneration": "an image encoder (Gemma3ForCausalLM, its text part alone, is known)",
    "Qwen2MoeForCausalLM": "shared experts beside the routed ones",
    "DeepseekV3ForCausalLM": "latent attention and mixture-of-experts layers",
    "GPT2LMHeadModel": "learned positions, LayerNorm and biases",
    "Phi3ForCausalLM": "fused projections in Hugging Face's own layout",
}
_REQUIRED = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size", "intermediate_size")


def read_config(directory: Path) -> ModelConfig:
    """config.json as a ModelConfig; raises CheckpointError naming what this model needs and we lack."""
    path = directory / "config.json"
    values = _read(directory)
    family = _require_known(values, path)
    if family in GEMMAS:
        values = hf_gemma.completed(values, family, path)
    rope = values.get("rope_parameters") or {}
    heads = values["num_attention_heads"]
    eos = values.get("eos_token_id")
    windows = hf_windows.read(values, family, path)
    scaling = _rope_scaling(values, path)
    longest = _longest(values, scaling)
    dtype = str(values.get("dtype") or values.get("torch_dtype") or "float32")
    return parse_config(
        ModelConfig,
        {
            "num_layers": values["num_hidden_layers"],
            "hidden_size": values["hidden_size"],
            "ffn_hidden_size": values["intermediate_size"],
            "num_attention_heads": heads,
            "num_kv_heads": values.get("num_key_value_heads") or heads,
            "head_dim": values.get("head_dim") or values["hidden_size"] // heads,
            "vocab_size": values["vocab_size"],
            "rotary_percent": rope.get("partial_rotary_factor", values.get("partial_rotary_factor") or 1.0),
            "rotary_base": rope.get("rope_theta", values.get("rope_theta") or 10000.0),
            "rope_scaling": scaling,
            "qkv_bias": family == "qwen2",
            "qk_layernorm": family in ("qwen3", "qwen3_moe", "gemma3_text"),
            "mixture": _mixture(values, family, path),
            "sliding_window": windows.size,
            "windowed_layers": windows.layers,
            "gemma": hf_gemma.settings(values) if family in GEMMAS else None,
            "norm_epsilon": values.get("rms_norm_eps", 1e-6),
            "tie_embeddings": bool(values.get("tie_word_embeddings")),
            "max_context_tokens": longest,
            "dtype": "fp32" if dtype == "float32" else "bf16",
            "eos_token_ids": () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        },
        str(path),
    )


def _read(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} cannot be read: it holds no mapping of keys to values")
    return values


def _require_known(values: dict[str, Any], path: Path) -> Family:
    name = str((values.get("architectures") or ["(none)"])[0])
    if name not in _FAMILIES:
        lacking = f": it needs {_LACKING[name]}" if name in _LACKING else ""
        known = ", ".join(sorted(_FAMILIES))
        raise CheckpointError(f"{path}: architecture {name} is not supported yet{lacking}; known: {known}")
    for key in ("attention_bias", "mlp_bias"):
        if values.get(key):
            raise CheckpointError(f"{path}: {key} is not supported yet; only layers without it are")
    key, wanted = ("hidden_activation", hf_gemma.ACTIVATION) if _FAMILIES[name] in GEMMAS else ("hidden_act", "silu")
    if values.get(key, wanted) != wanted:
        raise CheckpointError(f"{path}: {key} {values[key]!r} is not supported yet; only {wanted!r} is")
    if values.get("quantization_config"):
        method = (values["quantization_config"] or {}).get("quant_method", "?")
        raise CheckpointError(f"{path}: weights quantised by {method!r} are not read; take the original ones")
    missing = [key for key in _REQUIRED if key not in values]
    if missing:
        raise CheckpointError(f"{path}: the key {missing[0]!r} is missing")
    return _FAMILIES[name]


def _longest(values: dict[str, Any], scaling: dict[str, Any] | None) -> int | None:
    """YaRN is switched on beside a max_position_embeddings that stays that of pre-training (Qwen's model cards)."""
    longest = values.get("max_position_embeddings")
    if longest and scaling is not None and scaling["kind"] == "yarn" and scaling["factor"]:
        longest = max(longest, int(scaling["factor"] * (scaling["original_context_tokens"] or longest)))
    return None if longest is None else int(longest)


def _mixture(values: dict[str, Any], family: Family, path: Path) -> dict[str, Any] | None:
    if family not in ("mixtral", "qwen3_moe"):
        return None
    if values.get("mlp_only_layers") or values.get("decoder_sparse_step", 1) != 1:
        raise CheckpointError(f"{path}: dense layers among mixture-of-experts layers are not supported yet")
    is_qwen = family == "qwen3_moe"
    return {
        "num_experts": values.get("num_local_experts") or values.get("num_experts"),
        "experts_per_token": values.get("num_experts_per_tok"),
        "ffn_hidden_size": values.get("moe_intermediate_size") if is_qwen else values["intermediate_size"],
        "normalize_weights": bool(values.get("norm_topk_prob", False)) if is_qwen else True,
    }


def _rope_scaling(values: dict[str, Any], path: Path) -> dict[str, Any] | None:
    rope = {**(values.get("rope_scaling") or {}), **(values.get("rope_parameters") or {})}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    longest = values.get("max_position_embeddings")
    original = rope.get("original_max_position_embeddings") or values.get("original_max_position_embeddings") or longest
    if kind == "linear":
        return {"kind": kind, "factor": rope.get("factor")}
    if kind == "llama3":
        keys = ("factor", "low_freq_factor", "high_freq_factor")
        return {"kind": kind, "original_context_tokens": original, **{key: rope[key] for key in keys if key in rope}}
    if kind == "yarn":
        return _yarn(rope, original, longest)
    raise CheckpointError(f"{path}: RoPE scaling {kind!r} is not supported yet; known: linear, llama3, yarn")


def _yarn(rope: dict[str, Any], original: int | None, longest: int | None) -> dict[str, Any]:
    factor = rope.get("factor") or (longest / original if longest and original else None)
    values = {
        "kind": "yarn",
        "factor": factor,
        "original_context_tokens": original,
        "beta_fast": rope.get("beta_fast") or 32.0,
        "beta_slow": rope.get("beta_slow") or 1.0,
        "truncate": rope.get("truncate", True),
        "attention_factor": rope.get("attention_factor"),
    }
    if values["attention_factor"] is None and factor:
        mscale, all_dims = rope.get("mscale"), rope.get("mscale_all_dim")
        values["attention_factor"] = (
            _mscale(factor, mscale) / _mscale(factor, all_dims) if mscale and all_dims else _mscale(factor, 1.0)
        )
    return values


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def write_config(model: ModelConfig, directory: Path) -> None:
    """config.json as transformers' own classes read it; raises CheckpointError for a mixture that no family has."""
    if model.qkv_bias and (model.qk_layernorm or model.mixture is not None):
        raise CheckpointError(
            "no Hugging Face family here has a bias together with norms on queries and keys or experts"
        )
    if model.family == "mixtral" and model.mixture is not None and not model.mixture.normalize_weights:
        raise CheckpointError("Mixtral's experts have weights that sum to 1; this model's do not")
    if model.rotary_percent != 1.0:
        raise CheckpointError(f"rotary_percent {model.rotary_percent} has no place in a {model.family} config.json")
    eos = list(model.eos_token_ids)
    values: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[model.family]],
        "model_type": model.family,
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "vocab_size": model.vocab_size,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_epsilon,
        "tie_word_embeddings": model.tie_embeddings,
        "rope_theta": model.rotary_base,
        "rope_scaling": None if model.rope_scaling is None else _written_scaling(model.rope_scaling),
        "torch_dtype": "float32" if model.dtype == "fp32" else "bfloat16",
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
    }
    if model.mixture is not None:
        values.update(_written_mixture(model, model.mixture))
    if model.max_context_tokens is not None:
        values["max_position_embeddings"] = model.max_context_tokens
    values.update(hf_windows.written(model))
    if model.gemma is not None:
        values.update(hf_gemma.written(model, model.gemma))
    (directory / "config.json").write_text(json.dumps(values, indent=2) + "\n")


def _written_mixture(model: ModelConfig, mixture: MixtureConfig) -> dict[str, Any]:
    """transformers 4 and 5 call the number of experts differently."""
    count = {"num_experts": mixture.num_experts, "num_local_experts": mixture.num_experts}
    values: dict[str, Any] = {**count, "num_experts_per_tok": mixture.experts_per_token}
    if model.family == "mixtral":
        return {**values, "intermediate_size": mixture.ffn_hidden_size}
    return {
        **values,
        "moe_intermediate_size": mixture.ffn_hidden_size,
        "norm_topk_prob": mixture.normalize_weights,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _written_scaling(scaling: RopeScaling) -> dict[str, Any]:
    """Only the keys of its kind: transformers warns of others."""
    values: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    keys: tuple[str, ...] = ()
    if scaling.kind != "linear":
        values["original_max_position_embeddings"] = scaling.original_context_tokens
        keys = ("low_freq_factor", "high_freq_factor")
    if scaling.kind == "yarn":
        keys = ("beta_fast", "beta_slow", "truncate", "attention_factor")
    return {**values, **{key: getattr(scaling, key) for key in keys}}
