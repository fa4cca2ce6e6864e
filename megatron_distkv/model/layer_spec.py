"""Megatron's local layer spec with one submodule replaced: core attention is DistAttention. Gemma's parts: gemma.py."""

from functools import partial

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_distkv.attention import DistAttention, RotaryConfig
from megatron_distkv.config.model import ModelConfig
from megatron_distkv.model.gemma import Norm, use_gemma_parts
from megatron_distkv.model.mixture import Mixture, Router


def block_spec(model: ModelConfig) -> TransformerBlockSubmodules:
    """All layers, each with its own window and angles, and the norm after the last."""
    norm = WrappedTorchNorm if model.gemma is None else Norm
    return TransformerBlockSubmodules([_layer_spec(model, layer) for layer in range(model.num_layers)], norm)


def _layer_spec(model: ModelConfig, layer: int) -> ModuleSpec:
    """RoPE moves into DistAttention: Megatron's own knows no per-token positions, which packed batches need."""
    num_experts = None if model.mixture is None else model.mixture.num_experts
    spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=model.qk_layernorm, num_experts=num_experts)
    spec.submodules.self_attention.submodules.core_attention = partial(
        DistAttention,
        rotary=_rotary(model, layer),
        window=model.window_of(layer),
        soft_cap=None if model.gemma is None else model.gemma.score_soft_cap,
    )
    if num_experts is not None:
        spec.submodules.mlp.module = Mixture
        spec.submodules.mlp.submodules.router = Router
    if model.gemma is not None:
        use_gemma_parts(spec.submodules)
    return spec


def _rotary(model: ModelConfig, layer: int) -> RotaryConfig:
    if model.gemma is not None and model.gemma.window_rotary_base and model.window_of(layer) is not None:
        return RotaryConfig(model.rotary_percent, model.gemma.window_rotary_base)
    return RotaryConfig(model.rotary_percent, model.rotary_base, model.rope_scaling)
