"""Full rBlocks into a pool of int8, in C++. Contract: megatron_distkv/ops/int8_kv.py."""

import ctypes

import torch

from .library import DTYPES, Pack, check, check_indices, library


def pack_into(
    rblocks_BLK2ND: torch.Tensor,
    from_layer: int,
    from_ids: torch.Tensor,
    pool_BLKX: torch.Tensor,
    layer: int,
    block_ids: torch.Tensor,
) -> None:
    """Raises ValueError for shapes or layouts that do not fit, IndexError for an id or a layer outside."""
    from_blocks, from_layers, kv_heads, _, rblock_size, head_dim = rblocks_BLK2ND.shape
    num_blocks, num_layers = pool_BLKX.shape[:2]
    packed_bytes = 2 * rblock_size * head_dim + 4 * (head_dim + rblock_size)
    if pool_BLKX.shape[2:] != (kv_heads, packed_bytes) or pool_BLKX.dtype is not torch.uint8:
        raise ValueError("the pool must be of packed rBlocks, of as many heads and of the same size")
    if len(from_ids) != len(block_ids) or not (rblocks_BLK2ND.is_contiguous() and pool_BLKX.is_contiguous()):
        raise ValueError("as many rBlocks as places are needed, both contiguous")
    check_indices(from_ids, block_ids)
    args = Pack(
        ctypes.sizeof(Pack), torch.get_num_threads(), DTYPES[rblocks_BLK2ND.dtype], kv_heads, head_dim, rblock_size,
        from_layer, from_layers, layer, num_layers, from_blocks, num_blocks, len(block_ids),
        rblocks_BLK2ND.data_ptr(), pool_BLKX.data_ptr(), from_ids.data_ptr(), block_ids.data_ptr(),
    )  # fmt: skip
    check(library.distkv_pack_rblocks(ctypes.byref(args)))
