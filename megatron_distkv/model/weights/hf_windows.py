"""Sliding windows in Hugging Face's config.json: every family says differently which layers have one."""

from pathlib import Path
from typing import Any, NamedTuple

from megatron_distkv.config.model import Family, ModelConfig
from megatron_distkv.errors import CheckpointError

_SLIDING, _FULL = "sliding_attention", "full_attention"


class Windows(NamedTuple):
    """ModelConfig's `sliding_window` and `windowed_layers`."""

    size: int | None
    layers: tuple[bool, ...] | None = None


def read(values: dict[str, Any], family: Family, path: Path) -> Windows:
    """Windows where they could matter; absent keys mean what transformers takes them for.

    Raises CheckpointError for layers of a kind that is neither.
    """
    strangers = sorted(set(values.get("layer_types") or ()) - {_SLIDING, _FULL})
    if strangers:
        raise CheckpointError(f"{path}: layer_types has {strangers[0]!r}; only {_SLIDING!r} and {_FULL!r} are known")
    size = _size(values, family)
    longest = values.get("max_position_embeddings")
    if size is None or (longest and longest < size and not family.startswith("gemma")):
        return Windows(None)
    layers = _layers(values, family)
    if layers is None or all(layers):
        return Windows(int(size))
    return Windows(int(size), layers) if any(layers) else Windows(None)


def _size(values: dict[str, Any], family: Family) -> int | None:
    if family in ("mistral", "mixtral"):
        return values.get("sliding_window", 4096 if family == "mistral" else None)
    if family.startswith("gemma") or values.get("use_sliding_window"):
        return values.get("sliding_window", 4096)
    return None


def _layers(values: dict[str, Any], family: Family) -> tuple[bool, ...] | None:
    """None: all layers alike."""
    if family not in ("qwen2", "qwen3", "gemma2", "gemma3_text"):
        return None
    if values.get("layer_types"):
        return tuple(kind == _SLIDING for kind in values["layer_types"])
    numbers = range(values["num_hidden_layers"])
    if family.startswith("qwen"):
        return tuple(number >= values.get("max_window_layers", 28) for number in numbers)
    every = 2 if family == "gemma2" else values.get("sliding_window_pattern") or 6
    return tuple((number + 1) % every != 0 for number in numbers)


def written(model: ModelConfig) -> dict[str, Any]:
    """The keys that say so; raises CheckpointError when the family has none for it."""
    size, family = model.sliding_window, model.family
    is_layered = family in ("qwen2", "qwen3", "gemma2", "gemma3_text")
    if model.windowed_layers is not None and not is_layered:
        raise CheckpointError(f"a {family} config.json cannot say that some layers have a sliding window and some not")
    values: dict[str, Any] = {}
    if family in ("mistral", "mixtral") or size is not None:
        values["sliding_window"] = size
    if is_layered:
        windows = [model.window_of(layer) for layer in range(model.num_layers)]
        values["layer_types"] = [_FULL if window is None else _SLIDING for window in windows]
    if family.startswith("qwen"):
        values["use_sliding_window"] = size is not None
        values["max_window_layers"] = 0 if size is not None else model.num_layers
    return values
