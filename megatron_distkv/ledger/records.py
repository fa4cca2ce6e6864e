"""What the ledger stores and answers, as plain frozen records."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from megatron_distkv.messages import Counted
from megatron_distkv.rblock import InstanceId, LoanKey


class InstanceState(StrEnum):
    UP = "up"
    DRAINING = "draining"  # lends nothing any more


class LoanState(StrEnum):
    PENDING = "pending"  # reserved; the creditor has not answered yet
    ACTIVE = "active"  # the creditor has allocated


@dataclass(frozen=True)
class Registration:
    """`generation` names one life of the ledger's data: it changes when the data are lost."""

    epoch: int
    generation: str


@dataclass(frozen=True)
class RequestPlacementEntry:
    """`num_rblocks` rBlocks of a request lie at `holder` (the paper's [req_id, inst_id, num_blocks, local])."""

    request_id: str
    holder: InstanceId
    num_rblocks: int
    is_local: bool


def in_order(placements: Iterable[RequestPlacementEntry]) -> tuple[RequestPlacementEntry, ...]:
    """As the ledger keeps them: those of no rBlocks left out, the last one of each request and holder."""
    by_key = {(entry.request_id, entry.holder): entry for entry in placements}
    return tuple(by_key[key] for key in sorted(by_key) if by_key[key].num_rblocks > 0)


# So many heartbeats a second are asked of a ledger's server at most: what a pool of 1,000 sends with the usual 0.5 s
# (what that costs: tools/bench/ledger_scale). Smaller pools keep their members' own interval.
HEARTBEATS_PER_S = 2000
UNHURRIED_MEMBERS = 1000


def heartbeat_interval_s(num_members: int) -> float:
    """What the ledger asks members to wait at least: 5 s in a pool of 10,000."""
    return num_members / HEARTBEATS_PER_S if num_members > UNHURRIED_MEMBERS else 0.0


@dataclass(frozen=True)
class InstanceReport:
    """What a heartbeat says. Only local use, so that a late one cannot overwrite a reservation."""

    local_used_rblocks: int
    state: InstanceState = InstanceState.UP
    num_running: int = 0
    num_waiting: int = 0
    max_request_tokens: int = 0
    placements: tuple[RequestPlacementEntry, ...] | None = None  # all of them; None: as in the last answered report
    counted: tuple[Counted, ...] | None = None  # for /metrics, of who tells no gateway; None: as for placements
    prefill_tokens_left: int = 0  # of all its requests, running and waiting


@dataclass(frozen=True)
class Recall:
    """The creditor wants a loan's rBlocks back."""

    key: LoanKey
    debtor: InstanceId
    num_rblocks: int


@dataclass(frozen=True)
class MoveOrder:
    """A move of KV that the gManager has planned (the paper's move_kvcache)."""

    request_id: str
    source: InstanceId
    destination: InstanceId
    num_rblocks: int


@dataclass(frozen=True)
class HeartbeatReply:
    """`known` False: this epoch is not the live one, register again; the rest is then empty.

    What others would lend and how many members there are was counted a moment ago: a quarter of a ms for each member.
    """

    known: bool
    generation: str = ""
    lent: int = 0
    borrowed: int = 0
    free: int = 0
    lendable_now: int = 0  # rBlocks that all others together would lend now
    lending_caps: int = 0  # and at most, when none of them that is up uses its own memory
    num_members: int = 0  # this one too
    interval_s: float = 0.0  # the ledger asks for no more than one heartbeat in this time
    recalls: tuple[Recall, ...] = ()
    moves: tuple[MoveOrder, ...] = ()


@dataclass(frozen=True)
class CreditorOffer:
    """An instance that would lend `free_rblocks` rBlocks now; `info` is empty where it cannot be read."""

    instance: InstanceId
    epoch: int
    address: str
    free_rblocks: int
    info: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Loan:
    key: LoanKey
    debtor: InstanceId
    debtor_epoch: int
    creditor: InstanceId
    creditor_epoch: int
    num_rblocks: int
    state: LoanState

    @property
    def is_active(self) -> bool:
        return self.state is LoanState.ACTIVE


@dataclass(frozen=True)
class MemberCounts:
    """What the ledger counts of one life of a member."""

    instance: InstanceId
    epoch: int
    address: str
    total: int
    reserved: int
    local_used: int
    lent: int
    borrowed: int
    state: InstanceState
    num_running: int
    num_waiting: int
    max_request_tokens: int
    prefill_tokens_left: int
    lease_left_ms: int

    @property
    def lendable_at_most(self) -> int:
        """The lending cap."""
        return self.total - self.reserved

    @property
    def free_to_lend(self) -> int:
        return self.total - self.reserved - self.local_used - self.lent

    @property
    def free(self) -> int:
        """rBlocks that neither its own requests nor debtors use."""
        return max(0, self.total - self.local_used - self.lent)


@dataclass(frozen=True)
class InstanceRecord(MemberCounts):
    """`info`: what the member says of itself, in words that only members read. `counted`: since it began."""

    info: Mapping[str, str] = field(default_factory=dict)
    counted: tuple[Counted, ...] = ()
