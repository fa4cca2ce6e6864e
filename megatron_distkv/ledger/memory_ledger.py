"""The ledger in this process's memory: for one lonely instance, for tests, and as the plain statement of the rules.

Same semantics as the Redis scripts, line for line; one stateful test drives both.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from megatron_distkv.errors import LedgerUnavailable, SupersededError
from megatron_distkv.ledger.pool_snapshot import PoolSnapshot
from megatron_distkv.ledger.records import (
    Creditor,
    HeartbeatReply,
    InstanceRecord,
    InstanceReport,
    InstanceState,
    Loan,
    LoanState,
    Move,
    Recall,
    Registration,
    RequestPlacementEntry,
)
from megatron_distkv.messages import Refusal
from megatron_distkv.rblock import InstanceId, LoanId

# How many dead instances or overdue loans a heartbeat clears on its way.
EXPIRE_PER_HEARTBEAT = 4
MAX_EVENTS = 4096


@dataclass
class _Entry:
    record: InstanceRecord  # its lease_left_ms is filled in by snapshot()
    lease_end_ms: int
    placements: dict[tuple[str, InstanceId], RequestPlacementEntry] = field(default_factory=dict)
    moves: list[Move] = field(default_factory=list)


class MemoryLedger:
    """`clock_ms` is injected by tests."""

    def __init__(self, clock_ms: Callable[[], int] | None = None) -> None:
        self._clock_ms = clock_ms or (lambda: time.time_ns() // 1_000_000)
        self._lock = threading.RLock()
        self._events: deque[dict[str, str]] = deque(maxlen=MAX_EVENTS)
        self.lose_everything()

    def lose_everything(self) -> None:
        """What a restart of the server without its data does."""
        self._entries: dict[InstanceId, _Entry] = {}
        self._loans: dict[LoanId, Loan] = {}
        self._pending_until_ms: dict[LoanId, int] = {}
        self._recalled: set[LoanId] = set()
        self._epoch = 0
        self._generation = ""
        self._leader: tuple[str, int] = ("", 0)

    # ------------------------------------------------------------------ lives

    def register(
        self,
        instance: InstanceId,
        address: str,
        total_rblocks: int,
        reserved_rblocks: int,
        lease_s: float,
        *,
        epoch: int = 0,
        generation: str = "",
        info: Mapping[str, str] | None = None,
    ) -> Registration:
        with self._lock:
            now = self._clock_ms()
            old = self._entries.get(instance)
            if old is not None and 0 < epoch < old.record.epoch:
                raise SupersededError(f"a newer {instance} has registered (epoch {old.record.epoch}, this is {epoch})")
            if old is not None:
                self._bury(instance, "replaced")
            self._generation = self._generation or f"g{now}"
            self._epoch = max(self._epoch, now if self._epoch == 0 else 0)
            is_survivor = epoch > 0 and generation != self._generation
            new_epoch = epoch if is_survivor else self._epoch + 1
            self._epoch = max(self._epoch, new_epoch)
            record = InstanceRecord(
                instance, new_epoch, address, total_rblocks, reserved_rblocks, 0, 0, 0, InstanceState.UP, 0, 0, 0, 0,
                dict(info or {}),
            )  # fmt: skip
            self._entries[instance] = _Entry(record, now + int(lease_s * 1000))
            self._note("join", instance=instance, epoch=str(new_epoch))
            return Registration(new_epoch, self._generation)

    def heartbeat(self, instance: InstanceId, epoch: int, report: InstanceReport, lease_s: float) -> HeartbeatReply:
        with self._lock:
            now = self._clock_ms()
            if not self._is_live(instance, epoch):
                self._expire(EXPIRE_PER_HEARTBEAT)
                return HeartbeatReply(known=False)
            entry = self._entries[instance]
            entry.lease_end_ms = now + int(lease_s * 1000)
            entry.record = replace(
                entry.record,
                local_used=report.local_used_rblocks,
                state=report.state,
                num_running=report.num_running,
                num_waiting=report.num_waiting,
                max_request_tokens=report.max_request_tokens,
            )
            for placement in report.placements:
                self._note_placement(entry, placement)
            self._expire(EXPIRE_PER_HEARTBEAT)
            moves, entry.moves = tuple(entry.moves), []
            record = entry.record
            return HeartbeatReply(
                known=True,
                generation=self._generation,
                lent=record.lent,
                borrowed=record.borrowed,
                free=record.free_to_lend,
                recalls=self._recalls_of(instance),
                moves=moves,
            )

    def describe(self, instance: InstanceId, epoch: int, info: Mapping[str, str]) -> bool:
        with self._lock:
            if not self._is_live(instance, epoch):
                return False
            entry = self._entries[instance]
            entry.record = replace(entry.record, info=dict(info))
            return True

    def deregister(self, instance: InstanceId, epoch: int) -> None:
        with self._lock:
            if self._is_live(instance, epoch):
                self._bury(instance, "leave")

    def expire(self, limit: int = 64) -> list[InstanceId]:
        with self._lock:
            return self._expire(limit)

    # ------------------------------------------------------------------ loans

    def recommend(self, debtor: InstanceId, num_rblocks: int, limit: int) -> list[Creditor]:
        with self._lock:
            records = [entry.record for entry in self._entries.values() if self._may_lend(entry.record)]
            records.sort(key=lambda record: (record.free_to_lend, record.instance), reverse=True)
            found: list[Creditor] = []
            covered = 0
            for record in records:
                if len(found) >= limit or covered >= num_rblocks:
                    break
                if record.instance != debtor and self._is_live(record.instance, record.epoch):
                    found.append(Creditor(record.instance, record.epoch, record.address, record.free_to_lend))
                    covered += record.free_to_lend
            return found

    def borrow(
        self,
        loan_id: LoanId,
        debtor: InstanceId,
        debtor_epoch: int,
        creditor: InstanceId,
        creditor_epoch: int,
        num_rblocks: int,
        pending_s: float,
    ) -> Refusal | None:
        with self._lock:
            loan = Loan(loan_id, debtor, debtor_epoch, creditor, creditor_epoch, num_rblocks, LoanState.PENDING)
            known = self._loans.get(loan_id)
            if known is not None:
                return None if replace(known, state=LoanState.PENDING) == loan else Refusal.CONFLICT
            refusal = self._why_not(loan)
            if refusal is None:
                self._add(loan)
                self._pending_until_ms[loan_id] = self._clock_ms() + int(pending_s * 1000)
            return refusal

    def accept(self, loan_id: LoanId, creditor: InstanceId, creditor_epoch: int) -> Refusal | None:
        with self._lock:
            loan = self._loans.get(loan_id)
            if loan is None:
                return Refusal.UNKNOWN_LOAN
            if (loan.creditor, loan.creditor_epoch) != (creditor, creditor_epoch):
                return Refusal.STALE_CREDITOR
            if not self._is_live(creditor, creditor_epoch):
                return Refusal.STALE_CREDITOR
            self._loans[loan_id] = replace(loan, state=LoanState.ACTIVE)
            self._pending_until_ms.pop(loan_id, None)
            return None

    def release(self, loan_id: LoanId, instance: InstanceId, epoch: int) -> int:
        with self._lock:
            loan = self._loans.get(loan_id)
            if loan is None:
                return 0
            sides = ((loan.debtor, loan.debtor_epoch), (loan.creditor, loan.creditor_epoch))
            return self._drop(loan_id, "release") if (instance, epoch) in sides else 0

    def reclaim(self, creditor: InstanceId, epoch: int, num_rblocks: int) -> list[Recall]:
        with self._lock:
            if not self._is_live(creditor, epoch):
                return []
            mine = sorted(self.loans_of(creditor, epoch), key=lambda loan: (-loan.num_rblocks, loan.loan_id))
            recalls: list[Recall] = []
            for loan in mine:
                if num_rblocks <= 0:
                    break
                self._recalled.add(loan.loan_id)
                recalls.append(Recall(loan.loan_id, loan.debtor, loan.num_rblocks))
                num_rblocks -= loan.num_rblocks
            return recalls

    def restore(
        self,
        loan_id: LoanId,
        debtor: InstanceId,
        debtor_epoch: int,
        creditor: InstanceId,
        creditor_epoch: int,
        num_rblocks: int,
    ) -> Refusal | None:
        with self._lock:
            loan = Loan(loan_id, debtor, debtor_epoch, creditor, creditor_epoch, num_rblocks, LoanState.ACTIVE)
            known = self._loans.get(loan_id)
            if known is not None:
                return None if replace(known, state=LoanState.ACTIVE) == loan else Refusal.CONFLICT
            refusal = self._why_not_fenced(loan)
            if refusal is None and self._entries[creditor].record.lendable_at_most < self._lent(creditor) + num_rblocks:
                refusal = Refusal.CAP
            if refusal is None:
                self._add(loan)
            return refusal

    def loans_of(self, creditor: InstanceId, epoch: int) -> list[Loan]:
        with self._lock:
            if not self._is_live(creditor, epoch):
                raise LedgerUnavailable(f"the ledger does not know {creditor} (epoch {epoch}) now")
            return sorted((x for x in self._loans.values() if x.creditor == creditor), key=lambda x: x.loan_id)

    # ------------------------------------------------------------------ the pool

    def snapshot(self) -> PoolSnapshot:
        with self._lock:
            now = self._clock_ms()
            entries = [self._entries[instance] for instance in sorted(self._entries)]
            return PoolSnapshot(
                self._generation,
                now,
                tuple(replace(entry.record, lease_left_ms=entry.lease_end_ms - now) for entry in entries),
                tuple(self._loans[loan_id] for loan_id in sorted(self._loans)),
                {
                    entry.record.instance: tuple(entry.placements[key] for key in sorted(entry.placements))
                    for entry in entries
                    if entry.placements
                },
            )

    def lead(self, candidate: str, lease_s: float) -> bool:
        with self._lock:
            now = self._clock_ms()
            leader, until_ms = self._leader
            if leader != candidate and until_ms > now:
                return False
            self._leader = (candidate, now + int(lease_s * 1000))
            return True

    def publish_moves(self, leader: str, moves: Sequence[Move]) -> bool:
        with self._lock:
            if self._leader[0] != leader or self._leader[1] <= self._clock_ms():
                return False
            for move in moves:
                if move.source in self._entries:
                    self._entries[move.source].moves.append(move)
            return True

    def events(self, count: int) -> list[dict[str, str]]:
        with self._lock:
            return list(self._events)[-count:]

    def close(self) -> None:
        pass

    # ------------------------------------------------------------------ inside

    def _is_live(self, instance: InstanceId, epoch: int) -> bool:
        entry = self._entries.get(instance)
        return entry is not None and entry.record.epoch == epoch and entry.lease_end_ms > self._clock_ms()

    def _may_lend(self, record: InstanceRecord) -> bool:
        return record.state is InstanceState.UP and record.borrowed == 0 and record.free_to_lend > 0

    def _lent(self, creditor: InstanceId) -> int:
        return self._entries[creditor].record.lent

    def _why_not(self, loan: Loan) -> Refusal | None:
        refusal = self._why_not_fenced(loan)
        if refusal is not None:
            return refusal
        record = self._entries[loan.creditor].record
        if record.state is not InstanceState.UP:
            return Refusal.DRAINING
        if record.borrowed > 0:
            return Refusal.IN_DEBT
        if record.lendable_at_most - record.lent < loan.num_rblocks:
            return Refusal.CAP
        return Refusal.FULL if record.free_to_lend < loan.num_rblocks else None

    def _why_not_fenced(self, loan: Loan) -> Refusal | None:
        if loan.debtor == loan.creditor or loan.num_rblocks < 1:
            return Refusal.SELF
        if not self._is_live(loan.debtor, loan.debtor_epoch):
            return Refusal.STALE_DEBTOR
        return None if self._is_live(loan.creditor, loan.creditor_epoch) else Refusal.STALE_CREDITOR

    def _add(self, loan: Loan) -> None:
        self._loans[loan.loan_id] = loan
        self._change(loan.creditor, lent=loan.num_rblocks)
        self._change(loan.debtor, borrowed=loan.num_rblocks)
        self._note("loan", loan=loan.loan_id, debtor=loan.debtor, creditor=loan.creditor, rblocks=str(loan.num_rblocks))

    def _drop(self, loan_id: LoanId, why: str) -> int:
        loan = self._loans.pop(loan_id)
        self._pending_until_ms.pop(loan_id, None)
        self._recalled.discard(loan_id)
        self._change(loan.creditor, lent=-loan.num_rblocks)
        self._change(loan.debtor, borrowed=-loan.num_rblocks)
        self._note(why, loan=loan_id, debtor=loan.debtor, creditor=loan.creditor, rblocks=str(loan.num_rblocks))
        return loan.num_rblocks

    def _change(self, instance: InstanceId, lent: int = 0, borrowed: int = 0) -> None:
        entry = self._entries[instance]
        entry.record = replace(entry.record, lent=entry.record.lent + lent, borrowed=entry.record.borrowed + borrowed)

    def _bury(self, instance: InstanceId, why: str) -> None:
        for loan in sorted(self._loans.values(), key=lambda loan: loan.loan_id):
            if instance in (loan.debtor, loan.creditor):
                self._drop(loan.loan_id, "void")
        del self._entries[instance]
        self._note(why, instance=instance)

    def _expire(self, limit: int) -> list[InstanceId]:
        now = self._clock_ms()
        ended = sorted((entry.lease_end_ms, instance) for instance, entry in self._entries.items())
        dead = [instance for end_ms, instance in ended if end_ms <= now][:limit]
        for instance in dead:
            self._bury(instance, "dead")
        overdue = sorted((until_ms, loan_id) for loan_id, until_ms in self._pending_until_ms.items())
        for until_ms, loan_id in overdue[:limit]:
            if until_ms <= now:
                self._drop(loan_id, "overdue")
        return dead

    def _recalls_of(self, debtor: InstanceId) -> tuple[Recall, ...]:
        loans = (self._loans[loan_id] for loan_id in sorted(self._recalled))
        return tuple(Recall(x.loan_id, x.debtor, x.num_rblocks) for x in loans if x.debtor == debtor)

    def _note_placement(self, entry: _Entry, placement: RequestPlacementEntry) -> None:
        key = (placement.request_id, placement.holder)
        if placement.num_rblocks > 0:
            entry.placements[key] = placement
        else:
            entry.placements.pop(key, None)

    def _note(self, event: str, **fields: str) -> None:
        self._events.append({"at_ms": str(self._clock_ms()), "event": event, **fields})
