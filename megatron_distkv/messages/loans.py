"""A loan between two instances, from LEND to RELEASE, and the KV bytes that go there and come back."""

import msgspec

from megatron_distkv.messages.kinds import Refusal
from megatron_distkv.messages.wire import BlockId, Count, Serial


class Holder(msgspec.Struct, frozen=True):
    """Who has a loan: the name it gives, and what proves who it is.

    `certificate`: the fingerprint of the one that its channel showed; "" where channels show none (one host, TCP).
    """

    name: str
    certificate: str = ""

    def is_proven_by(self, asker: "Holder") -> bool:
        """Whether `asker` may be this one: a certificate that the loan was taken with is wanted at each use of it."""
        return self.name == asker.name and self.certificate in ("", asker.certificate)


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
    holder: Holder
    block_ids: list[BlockId]


class TransferHeader(msgspec.Struct, frozen=True):
    """The loan has another holder, and another id; what was stored under it is its."""

    loan_id: str
    new_loan_id: str
    holder: Holder


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
    """Answer: `Revoked`."""

    loan_id: str


class Revoked(msgspec.Struct, frozen=True):
    """Which of its rBlocks were stored under a loan that has ended, with all heads of this rank."""

    stored: list[BlockId] = []
