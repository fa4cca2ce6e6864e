"""Sliding windows in config.json: each family says in its own way which layers have one; this is what they share."""

from collections.abc import Iterable, Mapping
from typing import Any

from megatron_distkv.config.model import ModelConfig
from megatron_distkv.errors import CheckpointError

_SLIDING, _FULL = "sliding_attention", "full_attention"


def read_windows(
    size: int | None, layers: Iterable[bool] | None = None, *, longest: int | None = None
) -> dict[str, Any]:
    """ModelConfig's `sliding_window` and `windowed_layers`, where they matter.

    `layers`: which layers have the window; None: all. A window larger than `longest`, the longest context, is none.
    """
    entries = None if layers is None else tuple(layers)
    if size is None or (longest and longest < size) or (entries is not None and not any(entries)):
        return {}
    return {"sliding_window": int(size), "windowed_layers": None if entries is None or all(entries) else entries}


def read_layer_types(values: Mapping[str, Any]) -> tuple[bool, ...] | None:
    """Which layers have a window by `layer_types`, where that is given."""
    kinds = values.get("layer_types")
    return tuple(kind == _SLIDING for kind in kinds) if kinds else None


def require_known_layer_types(values: Mapping[str, Any], path: object) -> None:
    """Raises CheckpointError for layers that have neither a window nor full attention."""
    strangers = sorted(set(values.get("layer_types") or ()) - {_SLIDING, _FULL})
    if strangers:
        raise CheckpointError(f"{path}: layer_types has {strangers[0]!r}; only {_SLIDING!r} and {_FULL!r} are known")


def write_layer_types(model: ModelConfig) -> list[str]:
    return [_FULL if model.window_of(layer) is None else _SLIDING for layer in range(model.num_layers)]
