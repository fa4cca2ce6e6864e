"""The ledger in this process's memory: for one lonely instance, for tests, and as the plain statement of the rules.

Same semantics as the Redis scripts, line for line; one stateful test drives both.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from megatron_distkv.errors import LedgerUnavailable, SupersededError
from megatron_distkv.ledger.memory_state import Entry, MemoryState
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
)
from megatron_distkv.messages import Refusal
from megatron_distkv.rblock import InstanceId, LoanId

# How many dead instances or overdue loans a heartbeat clears on its way.
EXPIRE_PER_HEARTBEAT = 4


class MemoryLedger:
    """`clock_ms` is injected by tests."""

    def __init__(self, clock_ms: Callable[[], int] | None = None) -> None:
        self._clock_ms = clock_ms or (lambda: time.time_ns() // 1_000_000)
        self._lock = threading.RLock()
        self.lose_everything()

    def lose_everything(self) -> None:
        """What a restart of the server without its data does."""
        self._state = MemoryState(self._clock_ms)

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
            old = self._state.entries.get(instance)
            if old is not None and 0 < epoch < old.record.epoch:
                raise SupersededError(f"a newer {instance} has registered (epoch {old.record.epoch}, this is {epoch})")
            if old is not None:
                self._state.bury(instance, "replaced")
            self._state.generation = self._state.generation or f"g{now}"
            self._state.epoch = max(self._state.epoch, now if self._state.epoch == 0 else 0)
            is_survivor = epoch > 0 and generation != self._state.generation
            new_epoch = epoch if is_survivor else self._state.epoch + 1
            self._state.epoch = max(self._state.epoch, new_epoch)
            record = InstanceRecord(
                instance, new_epoch, address, total_rblocks, reserved_rblocks, 0, 0, 0, InstanceState.UP, 0, 0, 0, 0,
                dict(info or {}),
            )  # fmt: skip
            self._state.entries[instance] = Entry(record, now + int(lease_s * 1000))
            self._state.note("join", instance=instance, epoch=str(new_epoch))
            return Registration(new_epoch, self._state.generation)

    def heartbeat(self, instance: InstanceId, epoch: int, report: InstanceReport, lease_s: float) -> HeartbeatReply:
        with self._lock:
            now = self._clock_ms()
            if not self._state.is_live(instance, epoch):
                self._state.expire(EXPIRE_PER_HEARTBEAT)
                return HeartbeatReply(known=False)
            entry = self._state.entries[instance]
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
                self._state.note_placement(entry, placement)
            self._state.expire(EXPIRE_PER_HEARTBEAT)
            moves, entry.moves = tuple(entry.moves), []
            record = entry.record
            return HeartbeatReply(
                known=True,
                generation=self._state.generation,
                lent=record.lent,
                borrowed=record.borrowed,
                free=record.free_to_lend,
                recalls=self._state.recalls_of(instance),
                moves=moves,
            )

    def describe(self, instance: InstanceId, epoch: int, info: Mapping[str, str]) -> bool:
        with self._lock:
            if not self._state.is_live(instance, epoch):
                return False
            entry = self._state.entries[instance]
            entry.record = replace(entry.record, info=dict(info))
            return True

    def deregister(self, instance: InstanceId, epoch: int) -> None:
        with self._lock:
            if self._state.is_live(instance, epoch):
                self._state.bury(instance, "leave")

    def expire(self, limit: int = 64) -> list[InstanceId]:
        with self._lock:
            return self._state.expire(limit)

    # ------------------------------------------------------------------ loans

    def recommend(self, debtor: InstanceId, num_rblocks: int, limit: int) -> list[Creditor]:
        with self._lock:
            records = [entry.record for entry in self._state.entries.values() if self._state.may_lend(entry.record)]
            records.sort(key=lambda record: (record.free_to_lend, record.instance), reverse=True)
            found: list[Creditor] = []
            covered = 0
            for record in records:
                if len(found) >= limit or covered >= num_rblocks:
                    break
                if record.instance != debtor and self._state.is_live(record.instance, record.epoch):
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
            known = self._state.loans.get(loan_id)
            if known is not None:
                return None if replace(known, state=LoanState.PENDING) == loan else Refusal.CONFLICT
            refusal = self._state.why_not(loan)
            if refusal is None:
                self._state.add(loan)
                self._state.pending_until_ms[loan_id] = self._clock_ms() + int(pending_s * 1000)
            return refusal

    def accept(self, loan_id: LoanId, creditor: InstanceId, creditor_epoch: int) -> Refusal | None:
        with self._lock:
            loan = self._state.loans.get(loan_id)
            if loan is None:
                return Refusal.UNKNOWN_LOAN
            if (loan.creditor, loan.creditor_epoch) != (creditor, creditor_epoch):
                return Refusal.STALE_CREDITOR
            if not self._state.is_live(creditor, creditor_epoch):
                return Refusal.STALE_CREDITOR
            self._state.loans[loan_id] = replace(loan, state=LoanState.ACTIVE)
            self._state.pending_until_ms.pop(loan_id, None)
            return None

    def release(self, loan_id: LoanId, instance: InstanceId, epoch: int) -> int:
        with self._lock:
            loan = self._state.loans.get(loan_id)
            if loan is None:
                return 0
            sides = ((loan.debtor, loan.debtor_epoch), (loan.creditor, loan.creditor_epoch))
            return self._state.drop(loan_id, "release") if (instance, epoch) in sides else 0

    def reclaim(self, creditor: InstanceId, epoch: int, num_rblocks: int) -> list[Recall]:
        with self._lock:
            if not self._state.is_live(creditor, epoch):
                return []
            mine = sorted(self.loans_of(creditor, epoch), key=lambda loan: (-loan.num_rblocks, loan.loan_id))
            recalls: list[Recall] = []
            for loan in mine:
                if num_rblocks <= 0:
                    break
                self._state.recalled.add(loan.loan_id)
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
            known = self._state.loans.get(loan_id)
            if known is not None:
                return None if replace(known, state=LoanState.ACTIVE) == loan else Refusal.CONFLICT
            refusal = self._state.why_not_fenced(loan)
            if refusal is None:
                record = self._state.entries[creditor].record
                refusal = Refusal.CAP if record.lendable_at_most < record.lent + num_rblocks else None
            if refusal is None:
                self._state.add(loan)
            return refusal

    def transfer(
        self,
        loan_id: LoanId,
        new_loan_id: LoanId,
        heir: InstanceId,
        heir_epoch: int,
        creditor: InstanceId,
        creditor_epoch: int,
    ) -> Refusal | None:
        with self._lock:
            state = self._state
            mine = (creditor, creditor_epoch)
            known = state.loans.get(new_loan_id)
            if known is not None:
                is_same = (known.debtor, known.debtor_epoch, known.creditor, known.creditor_epoch) == (
                    heir, heir_epoch, *mine,
                )  # fmt: skip
                return None if is_same else Refusal.CONFLICT
            old = state.loans.get(loan_id)
            if old is None:
                return Refusal.UNKNOWN_LOAN
            if (old.creditor, old.creditor_epoch) != mine:
                return Refusal.STALE_CREDITOR
            new = replace(old, loan_id=new_loan_id, debtor=heir, debtor_epoch=heir_epoch, state=LoanState.ACTIVE)
            refusal = state.why_not_transfer(new)
            if refusal is None:
                state.drop(loan_id, "transfer")
                state.add(new)
            return refusal

    def loans_of(self, creditor: InstanceId, epoch: int) -> list[Loan]:
        with self._lock:
            if not self._state.is_live(creditor, epoch):
                raise LedgerUnavailable(f"the ledger does not know {creditor} (epoch {epoch}) now")
            return sorted((x for x in self._state.loans.values() if x.creditor == creditor), key=lambda x: x.loan_id)

    # ------------------------------------------------------------------ the pool

    def snapshot(self) -> PoolSnapshot:
        with self._lock:
            now = self._clock_ms()
            entries = [self._state.entries[instance] for instance in sorted(self._state.entries)]
            return PoolSnapshot(
                self._state.generation,
                now,
                tuple(replace(entry.record, lease_left_ms=entry.lease_end_ms - now) for entry in entries),
                tuple(self._state.loans[loan_id] for loan_id in sorted(self._state.loans)),
                {
                    entry.record.instance: tuple(entry.placements[key] for key in sorted(entry.placements))
                    for entry in entries
                    if entry.placements
                },
            )

    def lead(self, candidate: str, lease_s: float) -> bool:
        with self._lock:
            now = self._clock_ms()
            leader, until_ms = self._state.leader
            if leader != candidate and until_ms > now:
                return False
            self._state.leader = (candidate, now + int(lease_s * 1000))
            return True

    def publish_moves(self, leader: str, moves: Sequence[Move]) -> bool:
        with self._lock:
            if self._state.leader[0] != leader or self._state.leader[1] <= self._clock_ms():
                return False
            for move in moves:
                if move.source in self._state.entries:
                    self._state.entries[move.source].moves.append(move)
            return True

    def events(self, count: int) -> list[dict[str, str]]:
        with self._lock:
            return list(self._state.events)[-count:]

    def close(self) -> None:
        pass
