"""Qwen2: biases of queries, keys and values; sliding windows from some layer on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_distkv.config.model import ModelConfig
from megatron_distkv.model.config_json import (
    read_layer_types,
    read_shared,
    read_windows,
    write_layer_types,
    write_shared,
)
from megatron_distkv.model.families.family import Family
from megatron_distkv.model.families.llama import NAMES
from megatron_distkv.model.families.registry import register


def window_size(values: Mapping[str, Any]) -> int | None:
    return values.get("sliding_window", 4096) if values.get("use_sliding_window") else None


def read_layered(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """With windows in the layers of `layer_types`, or from `max_window_layers` on."""
    shared = read_shared(values, path)
    first = values.get("max_window_layers", 28)
    layers = read_layer_types(values) or [number >= first for number in range(values["num_hidden_layers"])]
    return {**shared, **read_windows(window_size(values), layers, longest=values.get("max_position_embeddings"))}


def write_window(model: ModelConfig) -> dict[str, Any]:
    size = model.sliding_window
    return {
        **({} if size is None else {"sliding_window": size}),
        "use_sliding_window": size is not None,
        "max_window_layers": 0 if size is not None else model.num_layers,
    }


def write_layered(model: ModelConfig) -> dict[str, Any]:
    return {**write_shared(model), **write_window(model), "layer_types": write_layer_types(model)}


register(
    Family(
        name="qwen2",
        architecture="Qwen2ForCausalLM",
        read=lambda values, path: {**read_layered(values, path), "qkv_bias": True},
        write=write_layered,
        tensor_names=NAMES,
        matches=lambda model: model.mixture is None and not model.qk_layernorm and model.qkv_bias,
    )
)
