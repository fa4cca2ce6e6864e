"""What stands in every family's config.json: sizes, RoPE, dtype, end tokens."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_distkv.config.model import ModelConfig
from megatron_distkv.errors import CheckpointError
from megatron_distkv.model.config_json.rope_scaling import longest_context, read_scaling, write_scaling
from megatron_distkv.model.config_json.windows import require_known_layer_types

_REQUIRED = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size", "intermediate_size")


def read_shared(
    values: Mapping[str, Any], path: Path, *, activation: tuple[str, str] = ("hidden_act", "silu")
) -> dict[str, Any]:
    """ModelConfig's fields that all families have; `activation` is the one that its MLP computes, with its key.

    Raises CheckpointError for what no family here can compute, with `path` in front.
    """
    _require_computable(values, path, activation)
    rope = values.get("rope_parameters") or {}
    heads = values["num_attention_heads"]
    eos = values.get("eos_token_id")
    scaling = read_scaling(values, path)
    dtype = str(values.get("dtype") or values.get("torch_dtype") or "float32")
    return {
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
        "norm_epsilon": values.get("rms_norm_eps", 1e-6),
        "tie_embeddings": bool(values.get("tie_word_embeddings")),
        "max_context_tokens": longest_context(values, scaling),
        "dtype": "fp32" if dtype == "float32" else "bf16",
        "eos_token_ids": () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
    }


def _require_computable(values: Mapping[str, Any], path: Path, activation: tuple[str, str]) -> None:
    for key in ("attention_bias", "mlp_bias"):
        if values.get(key):
            raise CheckpointError(f"{path}: {key} is not supported yet; only layers without it are")
    key, wanted = activation
    if values.get(key, wanted) != wanted:
        raise CheckpointError(f"{path}: {key} {values[key]!r} is not supported yet; only {wanted!r} is")
    if values.get("quantization_config"):
        method = (values["quantization_config"] or {}).get("quant_method", "?")
        raise CheckpointError(f"{path}: weights quantised by {method!r} are not read; take the original ones")
    missing = [key for key in _REQUIRED if key not in values]
    if missing:
        raise CheckpointError(f"{path}: the key {missing[0]!r} is missing")
    require_known_layer_types(values, path)


def write_shared(model: ModelConfig) -> dict[str, Any]:
    """The same keys, from a ModelConfig."""
    eos = list(model.eos_token_ids)
    values: dict[str, Any] = {
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
        "rope_scaling": write_scaling(model.rope_scaling),
        "torch_dtype": "float32" if model.dtype == "fp32" else "bfloat16",
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
    }
    if model.max_context_tokens is not None:
        values["max_position_embeddings"] = model.max_context_tokens
    return values
