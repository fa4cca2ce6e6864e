"""Gemma 3, text: Gemma 2's layers without the cap of scores; norms on each head's queries and keys, and RoPE of another
base in layers with a window, which are all but every sixth."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_distkv.config.base import parse_config
from megatron_distkv.config.model import ModelConfig
from megatron_distkv.errors import CheckpointError
from megatron_distkv.model.config_json import read_shared
from megatron_distkv.model.families import gemma2, qwen3
from megatron_distkv.model.families.family import Family, options_of
from megatron_distkv.model.families.gemma2 import GemmaOptions
from megatron_distkv.model.families.registry import register

# What transformers takes absent keys for.
_DEFAULTS = {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "max_position_embeddings": 131072}


def read(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    values = _rope_apart(gemma2.completed(values, path, _DEFAULTS), path)
    options = {  # scores are never capped, whatever the config says
        "score_scale_dims": values["query_pre_attn_scalar"],
        "logit_soft_cap": values.get("final_logit_softcapping"),
        "window_rotary_base": values["rope_local_base_freq"],
    }
    return {
        **read_shared(values, path, activation=gemma2.ACTIVATION),
        **gemma2.read_layers_with_window(values, every=values.get("sliding_window_pattern") or 6),
        "qk_layernorm": True,
        "family_options": parse_config(GemmaOptions, options, str(path)).model_dump(),
    }


def _rope_apart(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """Full layers' RoPE as everybody's, the others' base by itself, as older transformers wrote it."""
    rope = values.get("rope_parameters") or {}
    if "full_attention" not in rope and "sliding_attention" not in rope:
        return values
    local, whole = (rope.get(f"{kind}_attention") or {} for kind in ("sliding", "full"))
    if local.get("rope_type", "default") != "default":
        raise CheckpointError(f"{path}: RoPE scaling in sliding-window layers is not supported yet")
    base = local.get("rope_theta", values["rope_local_base_freq"])
    return {**values, "rope_parameters": whole, "rope_local_base_freq": base}


def write(model: ModelConfig) -> dict[str, Any]:
    options = options_of(model, GemmaOptions)
    values = {**gemma2.write_gemma(model, options), "attn_logit_softcapping": None}
    if options.window_rotary_base is not None:
        values["rope_local_base_freq"] = options.window_rotary_base
    return values


register(
    Family(
        name="gemma3_text",
        architecture="Gemma3ForCausalLM",
        read=read,
        write=write,
        tensor_names={**qwen3.NAMES, **gemma2.NAMES},
        options=GemmaOptions,
        parts=gemma2.PARTS,
    )
)
