"""The layers of a model: Megatron's, with core attention replaced by DistAttention. Gemma's parts: gemma.py."""

from functools import partial

from megatron_distkv.attention import DistAttention, RotaryConfig
from megatron_distkv.config.model import ModelConfig
from megatron_distkv.model.gemma import use_gemma_parts
from megatron_distkv.model.megatron_gpt import LocalLayer
from megatron_distkv.model.mixture import Mixture, Router


def layers_of(model: ModelConfig) -> list[LocalLayer]:
    """All layers, each with its own window and angles."""
    return [_layer(model, number) for number in range(model.num_layers)]


def _layer(model: ModelConfig, number: int) -> LocalLayer:
    """RoPE moves into DistAttention: Megatron's own knows no per-token positions, which packed batches need."""
    num_experts = None if model.mixture is None else model.mixture.num_experts
    layer = LocalLayer(qk_layernorm=model.qk_layernorm, num_experts=num_experts)
    layer.attention.core_attention = partial(
        DistAttention,
        rotary=_rotary(model, number),
        window=model.window_of(number),
        soft_cap=None if model.gemma is None else model.gemma.score_soft_cap,
    )
    if num_experts is not None:
        layer.use_mlp(Mixture)
        layer.mlp.router = Router
    if model.gemma is not None:
        use_gemma_parts(layer)
    return layer


def _rotary(model: ModelConfig, layer: int) -> RotaryConfig:
    if model.gemma is not None and model.gemma.window_rotary_base and model.window_of(layer) is not None:
        return RotaryConfig(model.rotary_percent, model.gemma.window_rotary_base)
    return RotaryConfig(model.rotary_percent, model.rotary_base, model.rope_scaling)
