"""What Gemma 2 and 3 (text) have in config.json beside the keys of all."""

from pathlib import Path
from typing import Any

from megatron_distkv.config.model import Family, GemmaConfig, ModelConfig
from megatron_distkv.errors import CheckpointError

GEMMAS: tuple[Family, ...] = ("gemma2", "gemma3_text")
ACTIVATION = "gelu_pytorch_tanh"
# What transformers takes absent keys for.
_BOTH = {"tie_word_embeddings": True, "query_pre_attn_scalar": 256, "head_dim": 256, "num_key_value_heads": 4}
_DEFAULTS: dict[Family, dict[str, Any]] = {
    "gemma2": {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "max_position_embeddings": 8192},
    "gemma3_text": {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "max_position_embeddings": 131072},
}


def completed(values: dict[str, Any], family: Family, path: Path) -> dict[str, Any]:
    """With defaults, and with Gemma 3's two kinds of RoPE apart: full layers' as everybody's, the others' base."""
    if values.get("use_bidirectional_attention"):
        raise CheckpointError(f"{path}: use_bidirectional_attention is not supported; tokens see the past alone")
    values = {**_BOTH, **_DEFAULTS[family], **values}
    rope = values.get("rope_parameters") or {}
    if "full_attention" in rope or "sliding_attention" in rope:
        local, whole = (rope.get(f"{kind}_attention") or {} for kind in ("sliding", "full"))
        if local.get("rope_type", "default") != "default":
            raise CheckpointError(f"{path}: RoPE scaling in sliding-window layers is not supported yet")
        values["rope_parameters"] = whole
        values["rope_local_base_freq"] = local.get("rope_theta", values["rope_local_base_freq"])
    return values


def settings(values: dict[str, Any]) -> dict[str, Any]:
    """A GemmaConfig's values. Gemma 3 never caps scores, whatever its config says."""
    is_second = "rope_local_base_freq" not in values
    return {
        "score_scale_dims": values["query_pre_attn_scalar"],
        "score_soft_cap": values.get("attn_logit_softcapping") if is_second else None,
        "logit_soft_cap": values.get("final_logit_softcapping"),
        "window_rotary_base": values.get("rope_local_base_freq"),
    }


def written(model: ModelConfig, gemma: GemmaConfig) -> dict[str, Any]:
    scale = gemma.score_scale_dims
    values: dict[str, Any] = {
        "hidden_activation": ACTIVATION,
        "query_pre_attn_scalar": int(scale) if scale == int(scale) else scale,
        "attn_logit_softcapping": gemma.score_soft_cap,
        "final_logit_softcapping": gemma.logit_soft_cap,
        "sliding_window": model.sliding_window,
    }
    if gemma.window_rotary_base is not None:
        values["rope_local_base_freq"] = gemma.window_rotary_base
    return values
