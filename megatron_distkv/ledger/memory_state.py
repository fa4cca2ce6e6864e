"""What a memory ledger holds, and the rules of its changes."""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from megatron_distkv.ledger.records import InstanceRecord, InstanceState, Loan, Move, Recall, RequestPlacementEntry
from megatron_distkv.messages import Refusal
from megatron_distkv.rblock import InstanceId, LoanId

MAX_EVENTS = 4096


@dataclass
class Entry:
    """A member of the pool."""

    record: InstanceRecord  # its lease_left_ms is filled in by snapshot()
    lease_end_ms: int
    placements: dict[tuple[str, InstanceId], RequestPlacementEntry] = field(default_factory=dict)
    moves: list[Move] = field(default_factory=list)


class MemoryState:
    """Members and loans; each member's sums change with its loans."""

    def __init__(self, clock_ms: Callable[[], int]) -> None:
        self.clock_ms = clock_ms
        self.events: deque[dict[str, str]] = deque(maxlen=MAX_EVENTS)
        self.entries: dict[InstanceId, Entry] = {}
        self.loans: dict[LoanId, Loan] = {}
        self.pending_until_ms: dict[LoanId, int] = {}
        self.recalled: set[LoanId] = set()
        self.epoch = 0
        self.generation = ""
        self.leader: tuple[str, int] = ("", 0)

    def is_live(self, instance: InstanceId, epoch: int) -> bool:
        entry = self.entries.get(instance)
        return entry is not None and entry.record.epoch == epoch and entry.lease_end_ms > self.clock_ms()

    def may_lend(self, record: InstanceRecord) -> bool:
        return record.state is InstanceState.UP and record.borrowed == 0 and record.free_to_lend > 0

    def why_not(self, loan: Loan) -> Refusal | None:
        """Why this loan cannot begin."""
        refusal = self.why_not_fenced(loan)
        if refusal is not None:
            return refusal
        record = self.entries[loan.creditor].record
        if record.state is not InstanceState.UP:
            return Refusal.DRAINING
        if record.borrowed > 0:
            return Refusal.IN_DEBT
        if record.lendable_at_most - record.lent < loan.num_rblocks:
            return Refusal.CAP
        return Refusal.FULL if record.free_to_lend < loan.num_rblocks else None

    def why_not_fenced(self, loan: Loan) -> Refusal | None:
        """Why its two sides cannot have any loan with each other now."""
        if loan.debtor == loan.creditor or loan.num_rblocks < 1:
            return Refusal.SELF
        if not self.is_live(loan.debtor, loan.debtor_epoch):
            return Refusal.STALE_DEBTOR
        return None if self.is_live(loan.creditor, loan.creditor_epoch) else Refusal.STALE_CREDITOR

    def why_not_transfer(self, loan: Loan) -> Refusal | None:
        """Why this cannot take the place of a loan with another debtor."""
        refusal = self.why_not_fenced(loan)
        if refusal is not None:
            return refusal
        creditor, heir = self.entries[loan.creditor].record, self.entries[loan.debtor].record
        return Refusal.IN_DEBT if creditor.borrowed > 0 and heir.lent > 0 else None

    def add(self, loan: Loan) -> None:
        self.loans[loan.loan_id] = loan
        self._change(loan.creditor, lent=loan.num_rblocks)
        self._change(loan.debtor, borrowed=loan.num_rblocks)
        self.note("loan", loan=loan.loan_id, debtor=loan.debtor, creditor=loan.creditor, rblocks=str(loan.num_rblocks))

    def drop(self, loan_id: LoanId, why: str) -> int:
        loan = self.loans.pop(loan_id)
        self.pending_until_ms.pop(loan_id, None)
        self.recalled.discard(loan_id)
        self._change(loan.creditor, lent=-loan.num_rblocks)
        self._change(loan.debtor, borrowed=-loan.num_rblocks)
        self.note(why, loan=loan_id, debtor=loan.debtor, creditor=loan.creditor, rblocks=str(loan.num_rblocks))
        return loan.num_rblocks

    def _change(self, instance: InstanceId, lent: int = 0, borrowed: int = 0) -> None:
        entry = self.entries[instance]
        entry.record = replace(entry.record, lent=entry.record.lent + lent, borrowed=entry.record.borrowed + borrowed)

    def bury(self, instance: InstanceId, why: str) -> None:
        """All its loans are void, whichever side it was on."""
        for loan in sorted(self.loans.values(), key=lambda loan: loan.loan_id):
            if instance in (loan.debtor, loan.creditor):
                self.drop(loan.loan_id, "void")
        del self.entries[instance]
        self.note(why, instance=instance)

    def expire(self, limit: int) -> list[InstanceId]:
        now = self.clock_ms()
        ended = sorted((entry.lease_end_ms, instance) for instance, entry in self.entries.items())
        dead = [instance for end_ms, instance in ended if end_ms <= now][:limit]
        for instance in dead:
            self.bury(instance, "dead")
        overdue = sorted((until_ms, loan_id) for loan_id, until_ms in self.pending_until_ms.items())
        for until_ms, loan_id in overdue[:limit]:
            if until_ms <= now:
                self.drop(loan_id, "overdue")
        return dead

    def recalls_of(self, debtor: InstanceId) -> tuple[Recall, ...]:
        loans = (self.loans[loan_id] for loan_id in sorted(self.recalled))
        return tuple(Recall(x.loan_id, x.debtor, x.num_rblocks) for x in loans if x.debtor == debtor)

    def note_placement(self, entry: Entry, placement: RequestPlacementEntry) -> None:
        key = (placement.request_id, placement.holder)
        if placement.num_rblocks > 0:
            entry.placements[key] = placement
        else:
            entry.placements.pop(key, None)

    def note(self, event: str, **fields: str) -> None:
        self.events.append({"at_ms": str(self.clock_ms()), "event": event, **fields})


class LockedState:
    """The state, one operation at a time. `clock_ms` is injected by tests."""

    def __init__(self, clock_ms: Callable[[], int] | None = None) -> None:
        self._clock_ms = clock_ms or (lambda: time.time_ns() // 1_000_000)
        self._lock = threading.RLock()
        self.lose_everything()

    def lose_everything(self) -> None:
        """What a restart of the server without its data does."""
        self._state = MemoryState(self._clock_ms)
