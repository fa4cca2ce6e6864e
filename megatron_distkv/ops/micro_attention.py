"""MicroAttention over a list of rBlocks, and the exact merge of partial results by log-sum-exp.

Over any partition of the keys into parts p, with out_p = softmax(q k_p) v_p and lse_p = log sum exp(q k_p):

    lse = log sum_p exp(lse_p)        out = sum_p exp(lse_p - lse) out_p

which is associative and commutative; (0, -inf) is its neutral element. Source: Infinite-LLM (arXiv 2401.02669), its
MicroAttention, in the normalised form of FlashDecoding.
"""

import torch

from megatron_distkv.kernels.cpu import attend_again
from megatron_distkv.ops.backend import cpu_comes_first, kernels


def micro_attention(
    q_THD: torch.Tensor,
    pool_BLK2ND: torch.Tensor,
    layer: int,
    block_ids_M: torch.Tensor,
    block_starts_M: torch.Tensor,
    cu_blocks: torch.Tensor,
    cu_queries: torch.Tensor,
    positions_T: torch.Tensor,
    scale: float,
    causal: bool,
    window: int | None = None,
    soft_cap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of S packed sequences, each over its own list of rBlocks of one layer.

    Sequence s has query rows `cu_queries[s] : cu_queries[s + 1]` and rBlocks `cu_blocks[s] : cu_blocks[s + 1]` of
    `block_ids_M` (indices into the pool); rBlock i holds positions from `block_starts_M[i]` on. All index tensors are
    int64. H is a multiple of K; query heads of one KV head are neighbours.

    A query at position p = `positions_T[t]` sees keys at positions

        <= p             with `causal`; without, every listed rBlock must be full
        > p - window     with a `window` (> 0), with `causal` or without: so a window counts the query's own token

    and starts and positions are not looked at where neither is given. `soft_cap` (> 0) makes a score x of what is
    seen, scaled by `scale`, soft_cap * tanh(x / soft_cap), before the softmax (Gemma 2).

    Returns out `[T, H, D]` and lse `[T, H]`, fp32, natural log; a query without any key gets (0, -inf).
    """
    args = (
        q_THD, pool_BLK2ND, layer, block_ids_M, block_starts_M, cu_blocks, cu_queries, positions_T, scale, causal,
        window, soft_cap,
    )  # fmt: skip
    if torch.compiler.is_compiling():
        return torch.ops.distkv.micro_attention(*args)  # not otherwise: it costs 20 us a call
    done = attend_again(*args) if cpu_comes_first() else None
    if done is not None:
        return done
    out, lse = kernels(q_THD, pool_BLK2ND).micro_attention(*args)
    return out, lse


torch.library.custom_op("distkv::micro_attention", micro_attention, mutates_args=())


@torch.library.register_fake("distkv::micro_attention")
def _(q_THD: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
    return q_THD.new_empty(q_THD.shape, dtype=torch.float32), q_THD.new_empty(q_THD.shape[:2], dtype=torch.float32)


def micro_attention_out(
    q_THD: torch.Tensor,
    pool_BLK2ND: torch.Tensor,
    layer: int,
    block_ids_M: torch.Tensor,
    block_starts_M: torch.Tensor,
    cu_blocks: torch.Tensor,
    cu_queries: torch.Tensor,
    positions_T: torch.Tensor,
    scale: float,
    causal: bool,
    window: int | None,
    soft_cap: float | None,
    out_THD: torch.Tensor,
    lse_TH: torch.Tensor,
) -> None:
    """The same into tensors at hand (fp32, contiguous): the way that costs least per call, and one for CUDA graphs."""
    args = (
        q_THD, pool_BLK2ND, layer, block_ids_M, block_starts_M, cu_blocks, cu_queries, positions_T, scale, causal,
        window, soft_cap,
    )  # fmt: skip
    if torch.compiler.is_compiling():
        torch.ops.distkv.micro_attention_out(*args, out_THD, lse_TH)
        return
    if not cpu_comes_first() or attend_again(*args, (out_THD, lse_TH)) is None:
        kernels(q_THD, pool_BLK2ND).micro_attention(*args, out=(out_THD, lse_TH))


torch.library.custom_op("distkv::micro_attention_out", micro_attention_out, mutates_args=("out_THD", "lse_TH"))


@torch.library.register_fake("distkv::micro_attention_out")
def _(*_: object) -> None:
    return None


def merge(outs_PTHD: torch.Tensor, lses_PTH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One partial out of P (fp32): out `[T, H, D]` and lse `[T, H]`."""
    if torch.compiler.is_compiling():
        return torch.ops.distkv.merge(outs_PTHD, lses_PTH)
    out, lse = kernels(outs_PTHD, lses_PTH).merge(outs_PTHD, lses_PTH)
    return out, lse


torch.library.custom_op("distkv::merge", merge, mutates_args=())


@torch.library.register_fake("distkv::merge")
def _(outs_PTHD: torch.Tensor, lses_PTH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return outs_PTHD.new_empty(outs_PTHD.shape[1:]), lses_PTH.new_empty(lses_PTH.shape[1:])


def merge_out(outs_PTHD: torch.Tensor, lses_PTH: torch.Tensor, out_THD: torch.Tensor, lse_TH: torch.Tensor) -> None:
    """The same into tensors at hand (fp32, contiguous), one of the partials if need be: fresh memory may cost more than
    the merge."""
    if torch.compiler.is_compiling():
        torch.ops.distkv.merge_out(outs_PTHD, lses_PTH, out_THD, lse_TH)
        return
    if out_THD.shape != outs_PTHD.shape[1:] or lse_TH.shape != lses_PTH.shape[1:]:
        raise ValueError("out and lse must have the shape of one partial")
    if not all(x.dtype is torch.float32 and x.is_contiguous() for x in (out_THD, lse_TH)):
        raise ValueError("out and lse must be contiguous fp32 tensors")
    kernels(outs_PTHD, lses_PTH).merge(outs_PTHD, lses_PTH, (out_THD, lse_TH))


torch.library.custom_op("distkv::merge_out", merge_out, mutates_args=("out_THD", "lse_TH"))


@torch.library.register_fake("distkv::merge_out")
def _(*_: object) -> None:
    return None
