"""What a library's attention can do for us: rBlocks that are full and in the past of all their sequence's queries.

They need no mask, so any library that returns the LSE can serve them, in any order. The rest of a sequence (its tail,
causal by position) is for our own kernels, and the two partials are merged. Windows, soft caps and int8 are ours whole.
Looking at positions makes a GPU wait for the host: an engine that knows its spans would ask for the two apart.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from .native import best_for

Partial = tuple[torch.Tensor, torch.Tensor]  # out `[T, H, D]` and natural LSE `[T, H]`


class FullBlocks(NamedTuple):
    """S sequences, each with queries and full rBlocks, over one layer of the pool (a view)."""

    q_THD: torch.Tensor
    pool_BK2ND: torch.Tensor
    block_ids_M: torch.Tensor
    cu_blocks: torch.Tensor
    cu_queries: torch.Tensor
    scale: float

    def packed_kv(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A copy for libraries that read no scattered rBlocks: k and v `[M * N, K, D]`."""
        kv_MK2ND = self.pool_BK2ND[self.block_ids_M]
        k, v = (kv_MK2ND[:, :, part].transpose(1, 2).flatten(0, 1) for part in (0, 1))
        return k, v


Library = Callable[[FullBlocks], Partial]  # its results in any dtype


def served_by(choose: Callable[[torch.Tensor, torch.Tensor], Library | None]) -> Callable[..., Partial]:
    """A backend's `micro_attention`; `choose` tells from queries and pool who serves their past, None: we do."""

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
        out: Partial | None = None,
        scales: Partial | None = None,
    ) -> Partial:
        args = (layer, block_ids_M, block_starts_M, cu_blocks, cu_queries, positions_T, scale, causal)
        is_ours = window is not None or soft_cap is not None or scales is not None
        library = None if is_ours else choose(q_THD, pool_BLK2ND)
        if library is None:
            ours = best_for(q_THD, *(scales or (pool_BLK2ND,)))
            whole = ours.micro_attention(q_THD, pool_BLK2ND, *args, window, soft_cap, out=out, scales=scales)
            return whole[0], whole[1]
        if out is not None:
            _check(q_THD, *out)
        found = _merged(library, q_THD, pool_BLK2ND, *args)
        return found if out is None else (out[0].copy_(found[0]), out[1].copy_(found[1]))

    return micro_attention


def _check(q_THD: torch.Tensor, out_THD: torch.Tensor, lse_TH: torch.Tensor) -> None:
    if out_THD.shape != q_THD.shape or lse_TH.shape != q_THD.shape[:2]:
        raise ValueError("out must have the queries' shape, lse that of their heads")
    if out_THD.dtype is not torch.float32 or lse_TH.dtype is not torch.float32:
        raise ValueError("out and lse must be fp32 tensors")


def _merged(
    library: Library,
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
) -> tuple[torch.Tensor, torch.Tensor]:
    counts, num_queries = cu_blocks.diff(), cu_queries.diff()
    sequence_M = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    is_past_M = num_queries[sequence_M] > 0
    if causal:
        first_S = torch.full_like(counts, torch.iinfo(torch.int64).max)
        sequence_T = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), num_queries)
        first_S.scatter_reduce_(0, sequence_T, positions_T[: len(sequence_T)], "amin")
        is_past_M &= block_starts_M + pool_BLK2ND.shape[4] - 1 <= first_S[sequence_M]
    past_S = torch.bincount(sequence_M[is_past_M], minlength=len(counts))
    partials = []
    if is_past_M.any():
        past_ids = block_ids_M[is_past_M]
        partials.append(_of_past(library, q_THD, pool_BLK2ND[:, layer], past_ids, past_S, cu_queries, scale))
    if not partials or not is_past_M.all():
        partials.append(
            best_for(q_THD, pool_BLK2ND).micro_attention(
                q_THD, pool_BLK2ND, layer, block_ids_M[~is_past_M], block_starts_M[~is_past_M],
                _cumulated(counts - past_S), cu_queries, positions_T, scale, causal,
            )
        )  # fmt: skip
    if len(partials) == 1:
        return partials[0]
    outs, lses = (torch.stack(parts) for parts in zip(*partials, strict=True))
    out, lse = best_for(outs, lses).merge(outs, lses)
    return out, lse


def _of_past(
    library: Library,
    q_THD: torch.Tensor,
    pool_BK2ND: torch.Tensor,
    block_ids_M: torch.Tensor,
    num_blocks_S: torch.Tensor,
    cu_queries: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Libraries differ in what a query without keys gets (LSE 0, +inf, or the end of the process): none are asked."""
    is_asked_S, num_queries_S = num_blocks_S > 0, cu_queries.diff()
    asked_T = torch.repeat_interleave(is_asked_S, num_queries_S).nonzero().squeeze(1)
    cu = (_cumulated(x[is_asked_S]) for x in (num_blocks_S, num_queries_S))
    found = library(FullBlocks(q_THD[asked_T], pool_BK2ND, block_ids_M, *cu, scale))
    out_THD = torch.zeros(q_THD.shape, dtype=torch.float32, device=q_THD.device)
    lse_TH = out_THD.new_full(q_THD.shape[:2], float("-inf"))
    out_THD[asked_T], lse_TH[asked_T] = (x.float() for x in found)
    return out_THD, lse_TH


def _cumulated(counts: torch.Tensor) -> torch.Tensor:
    return torch.cat((counts.new_zeros(1), counts.cumsum(0)))
