"""The decoder as serving walks it: Megatron's own modules and weights, without autograd, hooks and module calls.

Megatron's forward serves training too: an autograd function around every product, dropouts of nothing and a dozen
Python calls per layer take a third of a decode step. What is computed here, in which order, is the same: in fp32 to the
bit, in bf16 but for how products round (ops/linear.py; tests/model/test_serving_layers.py). A part that this file does
not know runs through its own forward, and a decoder with hooks inside, or with layers of another kind, is left to
Megatron as a whole.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_distkv.ops import linear

_Function = Callable[[torch.Tensor], torch.Tensor]


def can_walk(decoder: Any) -> bool:
    """Whether ServingLayers computes what the decoder's own forward would."""
    are_known = all(type(layer) is TransformerLayer for layer in decoder.layers)
    return are_known and not any(map(_has_hooks, decoder.modules()))


def _has_hooks(module: Any) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def output_product(module: Any, tied_weight: torch.Tensor | None) -> _Function:
    """Logits `[R, V / TP]` out of hidden states `[R, hidden]`; `tied_weight`: of an output layer without one."""
    weight = module.weight if tied_weight is None else tied_weight
    if type(module) is ColumnParallelLinear and module.bias is None and not _has_hooks(module):
        return partial(linear, w_NK=weight.detach())
    return output_by_own_forward(module, tied_weight)


def output_by_own_forward(module: Any, tied_weight: torch.Tensor | None) -> _Function:
    """The same, as Megatron computes them."""
    return partial(_by_own_forward, partial(module, weight=tied_weight))


class ServingLayers:
    """Hidden states `[T, hidden]` of packed tokens in and out, the last norm included; inside a forward context."""

    def __init__(self, decoder: Any) -> None:
        self._layers = [_Layer(layer) for layer in decoder.layers]
        self._last_norm = _norm(decoder.final_layernorm)

    def __call__(self, hidden_Th: torch.Tensor) -> torch.Tensor:
        for layer in self._layers:
            hidden_Th = hidden_Th + layer.attention(layer.attention_norm(hidden_Th))
            hidden_Th = hidden_Th + layer.mlp(layer.mlp_norm(hidden_Th))
        return self._last_norm(hidden_Th)


class _Layer:
    def __init__(self, layer: Any) -> None:
        self.attention_norm = _norm(layer.input_layernorm)
        self.attention: _Function = _Attention(layer.self_attention)
        self.mlp_norm = _norm(layer.pre_mlp_layernorm)
        self.mlp = _mlp(layer.mlp)


class _Attention:
    """Megatron's SelfAttention: q, k and v in one product, interleaved by KV head; norms; core attention; output."""

    def __init__(self, attention: Any) -> None:
        self._qkv = _product(attention.linear_qkv)
        self._kv_heads: int = attention.num_query_groups_per_partition
        self._group: int = attention.num_attention_heads_per_partition // self._kv_heads
        self._head_dim: int = attention.hidden_size_per_attention_head
        self._q_norm, self._k_norm = (
            None if norm is None else _norm(norm) for norm in (attention.q_layernorm, attention.k_layernorm)
        )
        self._core = attention.core_attention.forward
        self._projection = _product(attention.linear_proj)

    def __call__(self, x_Th: torch.Tensor) -> torch.Tensor:
        heads = self._qkv(x_Th).view(-1, 1, self._kv_heads, self._group + 2, self._head_dim)
        q_T1HD = heads[..., : self._group, :].reshape(-1, 1, self._kv_heads * self._group, self._head_dim)
        k_T1KD, v_T1KD = heads[..., self._group, :], heads[..., self._group + 1, :]
        if self._q_norm is not None and self._k_norm is not None:
            q_T1HD, k_T1KD = self._q_norm(q_T1HD), self._k_norm(k_T1KD)
        return self._projection(self._core(q_T1HD, k_T1KD, v_T1KD, None).squeeze(1))


def _norm(norm: Any) -> _Function:
    if isinstance(norm, torch.nn.RMSNorm):
        return partial(F.rms_norm, normalized_shape=norm.normalized_shape, weight=norm.weight.detach(), eps=norm.eps)
    forward: _Function = norm.forward
    return forward


def _mlp(mlp: Any) -> _Function:
    if type(mlp) is not MLP or not mlp.config.gated_linear_unit:
        return partial(_by_own_forward, mlp)
    first, second, activation = _product(mlp.linear_fc1), _product(mlp.linear_fc2), mlp.config.activation_func

    def gated(x_Th: torch.Tensor) -> torch.Tensor:
        gate_Tf, up_Tf = first(x_Th).chunk(2, dim=-1)
        return second(activation(gate_Tf) * up_Tf)

    return gated


def _by_own_forward(module: Any, x_Th: torch.Tensor) -> torch.Tensor:
    """Of a module that returns its output and a bias to be added later, which ours have none of."""
    out_T1h: torch.Tensor = module(x_Th[:, None])[0]
    return out_T1h[:, 0]


def _product(module: Any) -> _Function:
    """This rank's part of a parallel linear layer, the sum over ranks where Megatron has it, and a norm where NeMo has
    Gemma's."""
    norm = getattr(module, "post_layernorm", None)
    if type(module) not in (ColumnParallelLinear, RowParallelLinear) and norm is None:
        return partial(_by_own_forward, module)
    steps: list[_Function] = [partial(linear, w_NK=module.weight.detach())]
    if isinstance(module, RowParallelLinear) and parallel_state.get_tensor_model_parallel_world_size() > 1:
        steps.append(_sum_over_ranks)
    if module.bias is not None:
        steps.append(partial(torch.add, other=module.bias.detach()))  # rounded twice, as Megatron does
    if norm is not None:
        steps.append(_norm(norm))
    return steps[0] if len(steps) == 1 else partial(_in_turn, steps)


def _in_turn(steps: list[_Function], x: torch.Tensor) -> torch.Tensor:
    for step in steps:
        x = step(x)
    return x


def _sum_over_ranks(x_Th: torch.Tensor) -> torch.Tensor:
    dist.all_reduce(x_Th, group=parallel_state.get_tensor_model_parallel_group())
    return x_Th
