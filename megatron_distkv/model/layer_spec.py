"""The layers of a model: Megatron's, with core attention replaced by DistAttention and what the family changes."""

from functools import partial

from megatron_distkv.attention import DistAttention, RotaryConfig
from megatron_distkv.config.model import ModelConfig
from megatron_distkv.model.families import family_of
from megatron_distkv.model.megatron_gpt import LocalLayer
from megatron_distkv.model.mixture import ExpertRouter, Mixture


def layers_of(model: ModelConfig) -> list[LocalLayer]:
    """All layers, each with its own window and angles."""
    return [_layer(model, number) for number in range(model.num_layers)]


def _layer(model: ModelConfig, number: int) -> LocalLayer:
    """RoPE moves into DistAttention: Megatron's own knows no per-token positions, which packed batches need."""
    num_experts = None if model.mixture is None else model.mixture.num_experts
    layer = LocalLayer(qk_layernorm=model.qk_layernorm, num_experts=num_experts)
    layer.attention.core_attention = partial(
        DistAttention,
        rotary=RotaryConfig(model.rotary_percent, model.rotary_base, model.rope_scaling),
        window=model.window_of(number),
    )
    if num_experts is not None:
        layer.use_mlp(Mixture)
        layer.mlp.router = ExpertRouter
    family_of(model).parts.change_layer(layer, model, number)
    return layer
