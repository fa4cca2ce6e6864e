"""Whole rBlocks (all layers) out of a pool into one contiguous piece, and back."""

import torch

from megatron_distkv.ops.backend import kernels


@torch.library.custom_op("distkv::gather_rblocks", mutates_args=())
def gather_rblocks(pool_BLK2ND: torch.Tensor, block_ids: torch.Tensor) -> torch.Tensor:
    """A contiguous copy `[M, L, K, 2, N, D]` of the rBlocks `block_ids` (int64)."""
    return kernels(pool_BLK2ND).gather_rblocks(pool_BLK2ND, block_ids)


@gather_rblocks.register_fake
def _(pool_BLK2ND: torch.Tensor, block_ids: torch.Tensor) -> torch.Tensor:
    return pool_BLK2ND.new_empty((block_ids.shape[0], *pool_BLK2ND.shape[1:]))


@torch.library.custom_op("distkv::scatter_rblocks", mutates_args={"pool_BLK2ND"})
def scatter_rblocks(data_MLK2ND: torch.Tensor, pool_BLK2ND: torch.Tensor, block_ids: torch.Tensor) -> None:
    """Write rBlocks `[M, L, K, 2, N, D]` of the pool's dtype to `block_ids` (int64, no repeats)."""
    kernels(pool_BLK2ND).scatter_rblocks(data_MLK2ND, pool_BLK2ND, block_ids)


@scatter_rblocks.register_fake
def _(data_MLK2ND: torch.Tensor, pool_BLK2ND: torch.Tensor, block_ids: torch.Tensor) -> None:
    return None
