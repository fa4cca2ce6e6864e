"""Qwen3-MoE: Qwen3's attention, with experts in every layer; a window, if any, in all."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_distkv.config.model import ModelConfig
from megatron_distkv.errors import CheckpointError
from megatron_distkv.model.config_json import read_shared, read_windows, write_shared
from megatron_distkv.model.families.family import Family, TensorNames
from megatron_distkv.model.families.qwen2 import window_size, write_window
from megatron_distkv.model.families.qwen3 import NAMES as QWEN3_NAMES
from megatron_distkv.model.families.registry import register

_EXPERT = "model.layers.*.mlp.experts.*"
NAMES: TensorNames = {
    **QWEN3_NAMES,
    "decoder.layers.*.mlp.router": ("model.layers.*.mlp.gate",),
    "decoder.layers.*.mlp.experts.local_experts.*.linear_fc1": (f"{_EXPERT}.gate_proj", f"{_EXPERT}.up_proj"),
    "decoder.layers.*.mlp.experts.local_experts.*.linear_fc2": (f"{_EXPERT}.down_proj",),
}


def read(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    if values.get("mlp_only_layers") or values.get("decoder_sparse_step", 1) != 1:
        raise CheckpointError(f"{path}: dense layers among mixture-of-experts layers are not supported yet")
    windows = read_windows(window_size(values), longest=values.get("max_position_embeddings"))
    mixture = {
        "num_experts": values.get("num_local_experts") or values.get("num_experts"),
        "experts_per_token": values.get("num_experts_per_tok"),
        "ffn_hidden_size": values.get("moe_intermediate_size"),
        "normalize_weights": bool(values.get("norm_topk_prob", False)),
    }
    return {**read_shared(values, path), **windows, "qk_layernorm": True, "mixture": mixture}


def write(model: ModelConfig) -> dict[str, Any]:
    values = {**write_shared(model), **write_window(model), "decoder_sparse_step": 1, "mlp_only_layers": []}
    if model.mixture is not None:
        values["num_experts"] = values["num_local_experts"] = model.mixture.num_experts  # transformers 5, and 4
        values["num_experts_per_tok"] = model.mixture.experts_per_token
        values["moe_intermediate_size"] = model.mixture.ffn_hidden_size
        values["norm_topk_prob"] = model.mixture.normalize_weights
    return values


register(
    Family(
        name="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        read=read,
        write=write,
        tensor_names=NAMES,
        matches=lambda model: model.mixture is not None and model.qk_layernorm,
    )
)
