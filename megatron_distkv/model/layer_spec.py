"""Megatron's local layer spec with one submodule replaced: core attention is DistAttention."""

from functools import partial

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_distkv.attention import DistAttention, RotaryConfig
from megatron_distkv.model.mixture import Mixture, Router


def layer_spec(rotary: RotaryConfig, *, qk_layernorm: bool = False, num_experts: int | None = None) -> ModuleSpec:
    """RoPE moves into DistAttention: Megatron's own knows no per-token positions, which packed batches need."""
    spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=qk_layernorm, num_experts=num_experts)
    spec.submodules.self_attention.submodules.core_attention = partial(DistAttention, rotary=rotary)
    if num_experts is not None:
        spec.submodules.mlp.module = Mixture
        spec.submodules.mlp.submodules.router = Router
    return spec
