"""The messages of a channel: which kinds there are, and the short answer that most of them get."""

from enum import IntEnum, StrEnum

import msgspec


class MessageKind(IntEnum):
    """First field of every channel message; says which header follows."""

    LEND = 1  # debtor's leader -> creditor's leader: try_move_kvcache, reserve rBlocks
    RELEASE = 2  # debtor's leader -> creditor's leader: a loan ends
    STORE = 3  # debtor's rank r -> creditor's rank r: KV bytes of migrated rBlocks
    QUERY = 4  # debtor's rank r -> creditor's rank r: MicroAttention over borrowed rBlocks
    GRANT = 5  # creditor's leader -> its own followers: a loan's rBlocks
    REVOKE = 6  # creditor's leader -> its own followers: a loan has ended
    TRANSFER = 14  # creditor's leader -> its own followers: a loan has another holder
    STEP = 7  # an instance's leader -> its own followers: run one engine step
    FETCH = 9  # debtor's rank r -> creditor's rank r: KV bytes of borrowed rBlocks, fetched back
    PROBE = 13  # any member -> another's leader: what does the link cost? Any payload; the answer is empty
    COUNTS = 15  # an instance's leader -> its own followers: what have you counted?
    STOP = 8  # an instance's leader -> its own followers: exit
    PREPARE = 10  # a leaving instance's leader -> its successor's: room for a request
    COMMIT = 11  # a leaving instance's leader -> its successor's: the request, whose rBlocks are stored
    INHERIT = 12  # the successor's leader -> a creditor's leader: a loan of the one that leaves, in its own name


class Refusal(StrEnum):
    """Why a loan was not granted. The words go into logs, metrics and the ledger's replies."""

    FULL = "full"  # the creditor has too few free rBlocks
    CAP = "cap"  # the creditor already lends as much as its cap allows
    IN_DEBT = "in_debt"  # the creditor borrows itself: no chains
    SELF = "self"  # debtor and creditor are the same instance
    STALE_DEBTOR = "stale_debtor"  # the debtor's epoch or lease has ended
    STALE_CREDITOR = "stale_creditor"  # the creditor's epoch or lease has ended
    CONFLICT = "conflict"  # the loan id is in use with other terms
    DRAINING = "draining"  # the creditor is about to leave
    UNKNOWN_LOAN = "unknown_loan"  # no such loan, or it has ended
    LEDGER_DOWN = "ledger_down"  # the ledger cannot be asked: no new loans


class Acknowledge(msgspec.Struct, frozen=True):
    """Answer to STORE, FETCH, QUERY, RELEASE, COMMIT, GRANT and TRANSFER: refusal None means done.

    `held_back_s`: for so long the query waited because the creditor has work of its own.
    """

    refusal: Refusal | None = None
    held_back_s: float = 0.0
