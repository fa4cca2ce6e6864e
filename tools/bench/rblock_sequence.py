"""What the kernels are measured on: one long sequence whose rBlocks lie in random order in a large pool."""

from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from megatron_distkv.kvcache.pool_memory import describe_pages, zeroed_pool
from megatron_distkv.ops import micro_attention, micro_attention_int8, quantize_rblocks

LAYERS, LAYER, SIZE, SEED = 2, 1, 64, 0


class Shape(NamedTuple):
    kv_heads: int
    group: int
    head_dim: int
    dtype: torch.dtype


class Sequence:
    """One sequence of `num_keys` in random rBlocks of a pool, its last `num_queries` tokens as queries."""

    def __init__(self, shape: Shape, num_keys: int, num_queries: int, pool_bytes: int = 0) -> None:
        torch.manual_seed(SEED)
        self.shape, self.num_keys = shape, num_keys
        count = num_keys // SIZE
        dims = (LAYERS, shape.kv_heads, 2, SIZE, shape.head_dim)
        each = torch.Size(dims).numel() * shape.dtype.itemsize
        self.pool = zeroed_pool((max(count, pool_bytes // each), *dims), shape.dtype).normal_()
        self.ids = torch.randperm(len(self.pool))[:count].contiguous()
        self.starts = torch.arange(count) * SIZE
        self.q = torch.randn(num_queries, shape.kv_heads * shape.group, shape.head_dim).to(shape.dtype)
        self.positions = torch.arange(num_keys - num_queries, num_keys)
        self.cu_blocks, self.cu_queries = torch.tensor([0, count]), torch.tensor([0, num_queries])
        self.scale = shape.head_dim**-0.5

    @property
    def bytes_read(self) -> int:
        return self.num_keys * self.shape.kv_heads * 2 * self.shape.head_dim * self.shape.dtype.itemsize

    def attend(self) -> tuple[torch.Tensor, torch.Tensor]:
        indices = (self.ids, self.starts, self.cu_blocks, self.cu_queries, self.positions)
        return micro_attention(self.q, self.pool, LAYER, *indices, self.scale, True)

    def attend_int8(self, pool: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        indices = (self.ids, self.starts, self.cu_blocks, self.cu_queries, self.positions)
        return micro_attention_int8(self.q, *pool, LAYER, *indices, self.scale, True)

    def int8_pool(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The pool's rBlocks and their scales; some at a time, for memory."""
        pool, scales = zeroed_pool(tuple(self.pool.shape), torch.int8), []
        for some, quantized in zip(self.pool.split(64), pool.split(64), strict=True):
            numbers, *of_some = quantize_rblocks(some)
            quantized.copy_(numbers)
            scales.append(of_some)
        k_scales, v_scales = (torch.cat(parts) for parts in zip(*scales, strict=True))
        return pool, k_scales, v_scales

    def dense_kv(self) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V in one piece, `[1, K, X, D]`: what a peer without rBlocks is given for nothing."""
        kv = self.pool[self.ids, LAYER]
        k, v = (kv[:, :, part].transpose(0, 1).flatten(1, 2)[None].contiguous() for part in (0, 1))
        return k, v


@cache
def pool_pages() -> str:
    """What pages a full pool of this size lies on, asked afterwards."""
    return describe_pages(zeroed_pool((4 * cache_bytes(),), torch.uint8).fill_(1))


def cache_bytes() -> int:
    """The last-level cache as Linux tells it; 32 MiB where it does not."""
    sizes = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * 1024 for size in sizes if size.endswith("K")), default=32 << 20)
