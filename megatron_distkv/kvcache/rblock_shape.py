"""What one rBlock holds. All members of a pool agree on it, or none could compute over another's rBlocks."""

from typing import Annotated, Literal

import msgspec

from megatron_distkv.rblock import int8_head_bytes

_ITEM_BYTES = {"fp32": 4, "bf16": 2}
Positive = Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]


class RBlockShape(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Counts are those of the whole model; each of `tensor_parallel` ranks holds the same share of all heads."""

    num_layers: Positive
    num_query_heads: Positive
    num_kv_heads: Positive
    head_dim: Positive
    rblock_size: Positive
    dtype: Literal["fp32", "bf16"]
    tensor_parallel: Positive = 1
    kv_dtype: Literal["auto", "int8"] = "auto"  # auto: `dtype`, the model's

    def __post_init__(self) -> None:
        if self.num_query_heads % self.num_kv_heads or self.num_kv_heads % self.tensor_parallel:
            raise ValueError("tensor_parallel must divide num_kv_heads, and num_kv_heads num_query_heads")
        if self.kv_dtype == "int8" and self.rblock_size * self.head_dim % 2:
            raise ValueError("rBlocks in int8 need an even rblock_size or head_dim, for the alignment of their scales")

    @property
    def kv_name(self) -> str:
        """Of the dtype of K and V in a pool."""
        return "int8" if self.kv_dtype == "int8" else self.dtype

    @property
    def item_bytes(self) -> int:
        """Of one number in the model's dtype."""
        return _ITEM_BYTES[self.dtype]

    @property
    def query_heads_per_rank(self) -> int:
        return self.num_query_heads // self.tensor_parallel

    @property
    def rblock_bytes(self) -> int:
        """Of one rBlock, on all ranks together; the scales of int8 are part of it."""
        head_bytes = 2 * self.rblock_size * self.head_dim * self.item_bytes
        if self.kv_dtype == "int8":
            head_bytes = int8_head_bytes(self.rblock_size, self.head_dim)
        return self.num_layers * self.num_kv_heads * head_bytes

    @property
    def query_bytes_per_rank(self) -> int:
        """Of one decode's question to a creditor and its answer, in one layer, for one rank's heads."""
        return self.query_heads_per_rank * (self.head_dim * 2 * self.item_bytes + 4)  # answers: debtor.wire_dtype

    def of_one_rank(self) -> "RBlockShape":
        """The same rBlocks, held by one rank."""
        return msgspec.structs.replace(self, tensor_parallel=1)

    def differences(self, other: "RBlockShape") -> list[str]:
        """What differs, in words: `head_dim 64, not 128`. How many ranks share an rBlock makes no difference."""
        ours, theirs = (msgspec.structs.asdict(shape.of_one_rank()) for shape in (self, other))
        return [f"{name} {ours[name]}, not {theirs[name]}" for name in ours if ours[name] != theirs[name]]
