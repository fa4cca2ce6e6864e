"""Qwen3: norms on each head's queries and keys; windows as in Qwen2."""

from megatron_distkv.model.families.family import Family, TensorNames
from megatron_distkv.model.families.llama import NAMES as LLAMA_NAMES
from megatron_distkv.model.families.qwen2 import read_layered, write_layered
from megatron_distkv.model.families.registry import register

NAMES: TensorNames = {
    **LLAMA_NAMES,
    "decoder.layers.*.self_attention.q_layernorm": ("model.layers.*.self_attn.q_norm",),
    "decoder.layers.*.self_attention.k_layernorm": ("model.layers.*.self_attn.k_norm",),
}

register(
    Family(
        name="qwen3",
        architecture="Qwen3ForCausalLM",
        read=lambda values, path: {**read_layered(values, path), "qk_layernorm": True},
        write=write_layered,
        tensor_names=NAMES,
        matches=lambda model: model.mixture is None and model.qk_layernorm,
    )
)
