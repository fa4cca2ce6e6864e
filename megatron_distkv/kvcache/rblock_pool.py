"""The tensor that holds this rank's rBlocks."""

import torch

from megatron_distkv.errors import ConfigError
from megatron_distkv.kvcache.pool_memory import describe_pages, zeroed_pool
from megatron_distkv.kvcache.rblock_shape import RBlockShape
from megatron_distkv.rblock import int8_head_bytes

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class RBlockPool:
    """One tensor `[num_rblocks, layers, kv_heads, 2, rblock_size, head_dim]`; K at index 0 of the fourth axis, V at 1.

    Head-major, so that one rBlock of one layer is contiguous for kernels, a TP slice is a range of heads, and an rBlock
    travels as one contiguous piece. For int8 the last three axes are one, of bytes: numbers, then scales (ops.int8_kv).
    """

    def __init__(
        self,
        num_rblocks: int,
        num_layers: int,
        num_kv_heads: int,
        rblock_size: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | None = None,
    ) -> None:
        if min(num_rblocks, num_layers, num_kv_heads, rblock_size, head_dim) < 1:
            raise ConfigError("an rBlock pool needs at least one rBlock, layer, KV head, token and head dimension")
        heads = (num_rblocks, num_layers, num_kv_heads)
        shape: tuple[int, ...] = (*heads, 2, rblock_size, head_dim)
        if dtype is torch.int8:
            shape, dtype = (*heads, int8_head_bytes(rblock_size, head_dim)), torch.uint8
        self.tensor_BLK2ND = zeroed_pool(shape, dtype, device)
        self.rblock_size = rblock_size

    @property
    def num_rblocks(self) -> int:
        return self.tensor_BLK2ND.shape[0]

    @property
    def rblock_bytes(self) -> int:
        return self.tensor_BLK2ND[0].numel() * self.tensor_BLK2ND.element_size()

    def describe(self) -> str:
        """For people: how much memory, and on what pages it lies by now."""
        size = f"{self.num_rblocks} rBlocks of {self.rblock_bytes / 2**10:.0f} KiB"
        return f"{size} on {describe_pages(self.tensor_BLK2ND)}"


def torch_dtype(shape: RBlockShape) -> torch.dtype:
    """The model's: of queries, and of K and V as they are computed."""
    return _DTYPES[shape.dtype]


def rank_pool(shape: RBlockShape, num_rblocks: int) -> RBlockPool:
    """One rank's part of `num_rblocks` rBlocks."""
    return _pool_of(shape, num_rblocks, torch.int8 if shape.kv_dtype == "int8" else torch_dtype(shape))


def open_pool(shape: RBlockShape, num_rblocks: int) -> RBlockPool:
    """The same for rBlocks that are still being filled, in the model's dtype."""
    return _pool_of(shape, num_rblocks, torch_dtype(shape))


def _pool_of(shape: RBlockShape, num_rblocks: int, dtype: torch.dtype) -> RBlockPool:
    kv_heads = shape.num_kv_heads // shape.tensor_parallel
    return RBlockPool(num_rblocks, shape.num_layers, kv_heads, shape.rblock_size, shape.head_dim, dtype)
