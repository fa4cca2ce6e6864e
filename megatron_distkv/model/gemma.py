"""Gemma's parts that Megatron's local spec lacks: norms of 1 + weight, also after attention and MLP; scaled embeddings;
soft-capped logits.

The norms lie where NVIDIA's NeMo has them, so that names agree: `linear_proj.post_layernorm` and
`linear_fc2.post_layernorm`.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_distkv.config.model import GemmaConfig
from megatron_distkv.model.megatron_gpt import LocalLayer, MegatronGPT

gated_activation = partial(F.gelu, approximate="tanh")


class Norm(torch.nn.Module):
    """RMSNorm times 1 + weight, in fp32; the weight is stored as it is in Gemma's checkpoints, around 0."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **_: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        self._eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = F.rms_norm(x.float(), x.shape[-1:], eps=self._eps)
        return (normed * (1.0 + self.weight.float())).to(x.dtype)


class NormedRowParallelLinear(RowParallelLinear):
    """Its output is whole on every rank, so the norm after it needs no more communication."""

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.post_layernorm = Norm(config, output_size, config.layernorm_epsilon)

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        output, bias = super().forward(input_)
        return self.post_layernorm(output), bias


def use_gemma_parts(layer: LocalLayer) -> None:
    """Changes `layer` in place."""
    attention = layer.attention
    layer.parts.input_layernorm = layer.parts.pre_mlp_layernorm = Norm
    attention.linear_proj = layer.mlp.linear_fc2 = NormedRowParallelLinear
    if attention.q_layernorm not in (None, IdentityOp):
        attention.q_layernorm = attention.k_layernorm = Norm


def scale_and_cap(gpt: MegatronGPT, gemma: GemmaConfig, hidden_size: int, dtype: torch.dtype) -> None:
    """Hooks at both ends of the model, for serving and training alike."""
    scale = float(torch.tensor(hidden_size**0.5).to(dtype))  # rounded as Gemma's own code does
    gpt.embedding.register_forward_hook(lambda _, __, hidden: hidden * scale)
    cap = gemma.logit_soft_cap
    if cap is not None:
        gpt.output_layer.register_forward_hook(lambda _, __, out: (_capped(out[0], cap), out[1]))


def _capped(logits: torch.Tensor, cap: float) -> torch.Tensor:
    return (cap * torch.tanh(logits.float() / cap)).to(logits.dtype)
