"""Attention of one tile with its LSE, forward and backward: torch's flash kernel on CPUs, our own backward on GPUs.

Legend: S query tokens, X key tokens, B sequences, H query heads, K KV heads, D head dim. A tile is causal (S = X, the
same tokens) or full. The backward pass of each tile of the same queries takes their global out and LSE, and is then
exact: the sum over tiles is the gradient.
"""

from typing import NamedTuple

import torch

from megatron_distkv import ops

_flash_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Gradients(NamedTuple):
    q_SBHD: torch.Tensor
    k_XBKD: torch.Tensor
    v_XBKD: torch.Tensor


def tile_forward(
    q_SBHD: torch.Tensor, k_XBKD: torch.Tensor, v_XBKD: torch.Tensor, scale: float, is_causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """out `[S, B, H, D]` and lse `[S, B, H]` (fp32 at least), natural log. Every query must see a key."""
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q_SBHD, k_XBKD, v_XBKD))
    group = q.shape[1] // k.shape[1]
    if is_causal:
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    else:
        q = _fold(q, group)
    out, lse = (_flash_forward if _has_flash(q) else _eager_forward)(q, k, v, 0.0, is_causal, scale=scale)
    if not is_causal:
        out, lse = _unfold(out, group), _unfold(lse.unsqueeze(-1), group).squeeze(-1)
    return out.permute(2, 0, 1, 3), lse.permute(2, 0, 1)


def tile_backward(
    d_out_SBHD: torch.Tensor,
    q_SBHD: torch.Tensor,
    k_XBKD: torch.Tensor,
    v_XBKD: torch.Tensor,
    out_SBHD: torch.Tensor,
    lse_SBH: torch.Tensor,
    scale: float,
    is_causal: bool,
) -> Gradients:
    """This tile's share of the gradients; `out` and `lse` are those over all keys, not over the tile's."""
    if not _has_flash(q_SBHD):
        return Gradients(*ops.tile_backward(d_out_SBHD, q_SBHD, k_XBKD, v_XBKD, out_SBHD, lse_SBH, scale, is_causal))
    q, k, v, out, d_out = (x.permute(1, 2, 0, 3) for x in (q_SBHD, k_XBKD, v_XBKD, out_SBHD, d_out_SBHD))
    lse = lse_SBH.permute(1, 2, 0)
    kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    if is_causal:
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    else:
        q, out, d_out, lse = (*(_fold(x, group) for x in (q, out, d_out)), _fold(lse.unsqueeze(-1), group).squeeze(-1))
    d_q, d_k, d_v = _flash_backward(d_out, q, k, v, out, lse, 0.0, is_causal, scale=scale)
    if is_causal:
        d_k, d_v = (x.unflatten(1, (kv_heads, group)).sum(2, dtype=lse.dtype) for x in (d_k, d_v))
    else:
        d_q = _unfold(d_q, group)
    return Gradients(*(x.permute(2, 0, 1, 3) for x in (d_q, d_k, d_v)))


def _has_flash(x: torch.Tensor) -> bool:
    return x.device.type == "cpu"


def _fold(x_BHSD: torch.Tensor, group: int) -> torch.Tensor:
    """Queries of one KV head side by side, `[B, K, G * S, D]`: no key is repeated."""
    return x_BHSD.unflatten(1, (-1, group)).flatten(2, 3)


def _unfold(x_BKRD: torch.Tensor, group: int) -> torch.Tensor:
    return x_BKRD.unflatten(2, (group, -1)).flatten(1, 2)


def _eager_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: float, is_causal: bool, *, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same as the flash kernel, with scores of the whole tile in memory."""
    scores, lse_type = _scores(q, k, is_causal, scale), _lse_type(q)
    lse = scores.logsumexp(-1)
    return ((scores - lse[..., None]).exp() @ v.to(lse_type)).to(q.dtype), lse


def _scores(q: torch.Tensor, k: torch.Tensor, is_causal: bool, scale: float) -> torch.Tensor:
    scores = q.to(_lse_type(q)) @ k.to(_lse_type(q)).mT * scale
    if not is_causal:
        return scores
    return scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1), float("-inf"))


def _lse_type(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
