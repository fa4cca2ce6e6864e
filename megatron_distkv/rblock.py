"""Names of KV memory, without tensors.

An rBlock is a fixed number of tokens' K and V, for all layers. A request's tokens fill rBlocks in order; rBlock `i` of
a request holds positions `[i * rblock_size, (i + 1) * rblock_size)`. A span is a run of consecutive rBlocks of one
request that lie at one holder; a physical id is the rBlock's index in its holder's pool.
"""

import hashlib
import secrets
from typing import NewType, TypeAlias

import msgspec

InstanceId = NewType("InstanceId", str)
LoanId = NewType("LoanId", str)
LoanKey = NewType("LoanKey", str)

# The creditor and the loan of rBlocks in an instance's own host memory: no instance can have this name.
HOST = InstanceId("(host)")
HOST_LOAN = LoanId("(host)")


def new_loan_id(debtor: str, epoch: int, number: int) -> LoanId:
    """Unique in the pool, and not to be guessed: who names a loan to its creditor reads and writes its rBlocks."""
    return LoanId(f"{debtor}.{epoch}.{number}.{secrets.token_hex(16)}")


def loan_name(loan_id: str) -> str:
    """What may be shown of a loan's id, or of its key: all but its end."""
    return loan_id.rpartition(".")[0] or loan_id


def loan_key(loan_id: LoanId) -> LoanKey:
    """Under which the ledger has a loan: whoever reads it there cannot find the id."""
    return LoanKey(f"{loan_name(loan_id)}.{hashlib.sha256(loan_id.encode()).hexdigest()[:32]}")


class LocalSpan(msgspec.Struct, frozen=True, tag="local"):
    """rBlocks `first .. first + len(block_ids)` of a request, in this instance's own pool."""

    first: int
    block_ids: tuple[int, ...]


class RemoteSpan(msgspec.Struct, frozen=True, tag="remote"):
    """rBlocks `first .. first + len(block_ids)` of a request, in `creditor`'s pool, borrowed as `loan_id`.

    Creditor `HOST`, loan `HOST_LOAN`: in this instance's own host memory.
    """

    first: int
    block_ids: tuple[int, ...]
    creditor: InstanceId
    loan_id: LoanId


Span: TypeAlias = LocalSpan | RemoteSpan


def int8_head_bytes(rblock_size: int, head_dim: int) -> int:
    """Of one KV head of one layer of an rBlock in int8: K and V `[2, N, D]`, fp32 scales of K `[D]` and of V `[N]`."""
    return 2 * rblock_size * head_dim + 4 * (head_dim + rblock_size)


def num_rblocks_for(num_tokens: int, rblock_size: int) -> int:
    """How many rBlocks hold `num_tokens` tokens."""
    return -(-num_tokens // rblock_size)
