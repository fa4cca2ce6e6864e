"""Names of KV memory, without tensors.

An rBlock is a fixed number of tokens' K and V, for all layers. A request's tokens fill rBlocks in order; rBlock `i` of
a request holds positions `[i * rblock_size, (i + 1) * rblock_size)`. A span is a run of consecutive rBlocks of one
request that lie at one holder; a physical id is the rBlock's index in its holder's pool.
"""

from typing import NewType, TypeAlias

import msgspec

InstanceId = NewType("InstanceId", str)
LoanId = NewType("LoanId", str)


class LocalSpan(msgspec.Struct, frozen=True, tag="local"):
    """rBlocks `first .. first + len(block_ids)` of a request, in this instance's own pool."""

    first: int
    block_ids: tuple[int, ...]


class RemoteSpan(msgspec.Struct, frozen=True, tag="remote"):
    """rBlocks `first .. first + len(block_ids)` of a request, in `creditor`'s pool, borrowed as `loan_id`."""

    first: int
    block_ids: tuple[int, ...]
    creditor: InstanceId
    loan_id: LoanId


Span: TypeAlias = LocalSpan | RemoteSpan


def num_rblocks_for(num_tokens: int, rblock_size: int) -> int:
    """How many rBlocks hold `num_tokens` tokens."""
    return -(-num_tokens // rblock_size)
