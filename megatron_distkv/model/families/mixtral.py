"""Mixtral: Mistral's layers with experts, whose weights sum to 1."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_distkv.config.model import ModelConfig
from megatron_distkv.model.config_json import read_shared, read_windows, write_shared
from megatron_distkv.model.families.family import Family, TensorNames
from megatron_distkv.model.families.llama import NAMES as LLAMA_NAMES
from megatron_distkv.model.families.registry import register

_MOE = "model.layers.*.block_sparse_moe"
NAMES: TensorNames = {
    **LLAMA_NAMES,
    "decoder.layers.*.mlp.router": (f"{_MOE}.gate",),
    "decoder.layers.*.mlp.experts.local_experts.*.linear_fc1": (f"{_MOE}.experts.*.w1", f"{_MOE}.experts.*.w3"),
    "decoder.layers.*.mlp.experts.local_experts.*.linear_fc2": (f"{_MOE}.experts.*.w2",),
}


def read(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    shared = read_shared(values, path)
    windows = read_windows(values.get("sliding_window"), longest=values.get("max_position_embeddings"))
    mixture = {
        "num_experts": values.get("num_local_experts") or values.get("num_experts"),
        "experts_per_token": values.get("num_experts_per_tok"),
        "ffn_hidden_size": values["intermediate_size"],
        "normalize_weights": True,
    }
    return {**shared, **windows, "mixture": mixture}


def write(model: ModelConfig) -> dict[str, Any]:
    values = {**write_shared(model), "sliding_window": model.sliding_window}
    if model.mixture is not None:
        values["num_experts"] = values["num_local_experts"] = model.mixture.num_experts  # transformers 5, and 4
        values["num_experts_per_tok"] = model.mixture.experts_per_token
        values["intermediate_size"] = model.mixture.ffn_hidden_size
    return values


register(
    Family(
        name="mixtral",
        architecture="MixtralForCausalLM",
        read=read,
        write=write,
        tensor_names=NAMES,
        matches=lambda model: model.mixture is not None and not model.qk_layernorm,
    )
)
