"""Llama 2 and 3: the layers that all others are told by. RoPE scaling of every kind: ../config_json/rope_scaling.py."""

from megatron_distkv.config.model import ModelConfig
from megatron_distkv.model.config_json import read_shared, write_shared
from megatron_distkv.model.families.family import Family, TensorNames
from megatron_distkv.model.families.registry import register

NAMES: TensorNames = {
    "embedding.word_embeddings": ("model.embed_tokens",),
    "decoder.layers.*.input_layernorm": ("model.layers.*.input_layernorm",),
    "decoder.layers.*.self_attention.linear_qkv": tuple(f"model.layers.*.self_attn.{x}_proj" for x in "qkv"),
    "decoder.layers.*.self_attention.linear_proj": ("model.layers.*.self_attn.o_proj",),
    "decoder.layers.*.pre_mlp_layernorm": ("model.layers.*.post_attention_layernorm",),
    "decoder.layers.*.mlp.linear_fc1": ("model.layers.*.mlp.gate_proj", "model.layers.*.mlp.up_proj"),
    "decoder.layers.*.mlp.linear_fc2": ("model.layers.*.mlp.down_proj",),
    "decoder.final_layernorm": ("model.norm",),
    "output_layer": ("lm_head",),
}


def is_dense(model: ModelConfig) -> bool:
    """One MLP per layer, and neither biases nor norms in attention."""
    return model.mixture is None and not model.qk_layernorm and not model.qkv_bias


register(
    Family(
        name="llama",
        architecture="LlamaForCausalLM",
        read=read_shared,
        write=write_shared,
        tensor_names=NAMES,
        matches=lambda model: is_dense(model) and model.sliding_window is None,
    )
)
