"""What one rBlock holds. All members of a pool agree on it, or none could compute over another's rBlocks."""

from typing import Annotated, Literal

import msgspec
import torch

from megatron_distkv.kvcache.rblock_pool import RBlockPool

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Positive = Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]


class RBlockShape(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Counts are those of the whole model; each of `tensor_parallel` ranks holds the same share of all heads."""

    num_layers: Positive
    num_query_heads: Positive
    num_kv_heads: Positive
    head_dim: Positive
    rblock_size: Positive
    dtype: Literal["fp32", "bf16"]
    tensor_parallel: Positive = 1

    def __post_init__(self) -> None:
        if self.num_query_heads % self.num_kv_heads or self.num_kv_heads % self.tensor_parallel:
            raise ValueError("tensor_parallel must divide num_kv_heads, and num_kv_heads num_query_heads")

    @property
    def torch_dtype(self) -> torch.dtype:
        return _DTYPES[self.dtype]

    @property
    def query_heads_per_rank(self) -> int:
        return self.num_query_heads // self.tensor_parallel

    @property
    def rblock_bytes(self) -> int:
        """Of one rBlock, on all ranks together."""
        numbers = 2 * self.num_layers * self.num_kv_heads * self.rblock_size * self.head_dim
        return numbers * self.torch_dtype.itemsize

    @property
    def query_bytes_per_rank(self) -> int:
        """Of one decode's question to a creditor and its answer, in one layer, for one rank's heads."""
        answer = 4 if self.torch_dtype == torch.float32 else 2  # attention.debtor.wire_dtype
        return self.query_heads_per_rank * (self.head_dim * (self.torch_dtype.itemsize + answer) + 4)

    def rank_pool(self, num_rblocks: int) -> RBlockPool:
        """One rank's part of `num_rblocks` rBlocks."""
        kv_heads = self.num_kv_heads // self.tensor_parallel
        return RBlockPool(num_rblocks, self.num_layers, kv_heads, self.rblock_size, self.head_dim, self.torch_dtype)

    def of_one_rank(self) -> "RBlockShape":
        """The same rBlocks, held by one rank."""
        return msgspec.structs.replace(self, tensor_parallel=1)

    def differences(self, other: "RBlockShape") -> list[str]:
        """What differs, in words: `head_dim 64, not 128`. How many ranks share an rBlock makes no difference."""
        ours, theirs = (msgspec.structs.asdict(shape.of_one_rank()) for shape in (self, other))
        return [f"{name} {ours[name]}, not {theirs[name]}" for name in ours if ours[name] != theirs[name]]
