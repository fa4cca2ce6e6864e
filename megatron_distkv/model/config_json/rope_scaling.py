"""RoPE scaling in config.json: linear, llama3, YaRN."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_distkv.config.model import RopeScaling
from megatron_distkv.errors import CheckpointError


def read_scaling(values: Mapping[str, Any], path: Path) -> dict[str, Any] | None:
    """A RopeScaling's values; None: frequencies as they are. Raises CheckpointError for another kind."""
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


def longest_context(values: Mapping[str, Any], scaling: Mapping[str, Any] | None) -> int | None:
    """YaRN is switched on beside a max_position_embeddings that stays that of pre-training (Qwen's model cards)."""
    longest = values.get("max_position_embeddings")
    if longest and scaling is not None and scaling["kind"] == "yarn" and scaling["factor"]:
        longest = max(longest, int(scaling["factor"] * (scaling["original_context_tokens"] or longest)))
    return None if longest is None else int(longest)


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


def write_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """Only the keys of its kind: transformers warns of others."""
    if scaling is None:
        return None
    values: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    keys: tuple[str, ...] = ()
    if scaling.kind != "linear":
        values["original_max_position_embeddings"] = scaling.original_context_tokens
        keys = ("low_freq_factor", "high_freq_factor")
    if scaling.kind == "yarn":
        keys = ("beta_fast", "beta_slow", "truncate", "attention_factor")
    return {**values, **{key: getattr(scaling, key) for key in keys}}
