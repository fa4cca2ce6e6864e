"""A loan between two instances, from LEND to RELEASE, and the KV bytes that go there and come back."""

import msgspec

from megatron_distkv.messages.kinds import Refusal
from megatron_distkv.messages.wire import BlockId, Count, Serial


class LendHeader(msgspec.Struct, frozen=True):
    loan_id: str
    debtor: str
    debtor_epoch: Serial
    num_rblocks: Count


class LendReply(msgspec.Struct, frozen=True):
    """Physical ids of the granted rBlocks in the creditor's pool (the same on all its ranks), or a refusal."""

    block_ids: list[BlockId] = []
    refusal: Refusal | None = None


class GrantHeader(msgspec.Struct, frozen=True):
    loan_id: str
    debtor: str
    block_ids: list[BlockId]


class StoreHeader(msgspec.Struct, frozen=True):
    """Payload: the rBlocks' bytes, `[num_rblocks, layers, kv_heads, 2, rblock_size, head_dim]`, in the pool's dtype.

    Of a pool in int8 `[num_rblocks, layers, kv_heads, bytes]`, numbers and scales (ops.int8_kv).
    """

    loan_id: str
    block_ids: list[BlockId]


class FetchHeader(msgspec.Struct, frozen=True):
    """Reply payload: as that of a `StoreHeader`."""

    loan_id: str
    block_ids: list[int]


class ReleaseHeader(msgspec.Struct, frozen=True):
    loan_id: str
    debtor: str


class RevokeHeader(msgspec.Struct, frozen=True):
    loan_id: str
