"""Mistral: Llama's layers, all with a sliding window. Without one it is read as a Llama."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_distkv.config.model import ModelConfig
from megatron_distkv.model.config_json import read_shared, read_windows, write_shared
from megatron_distkv.model.families.family import Family
from megatron_distkv.model.families.llama import NAMES, is_dense
from megatron_distkv.model.families.registry import register


def read(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    size = values.get("sliding_window", 4096)
    return {**read_shared(values, path), **read_windows(size, longest=values.get("max_position_embeddings"))}


def write(model: ModelConfig) -> dict[str, Any]:
    return {**write_shared(model), "sliding_window": model.sliding_window}


register(
    Family(
        name="mistral",
        architecture="MistralForCausalLM",
        read=read,
        write=write,
        tensor_names=NAMES,
        matches=lambda model: is_dense(model) and model.sliding_window is not None,
    )
)
