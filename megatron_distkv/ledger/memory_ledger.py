"""The ledger in this process's memory: for one lonely instance, for tests, and as the plain statement of the rules.

Same semantics as the Redis scripts, line for line; one stateful test drives both. Contract: DebtLedger. What operations
share is in pool_state.py.
"""

import contextlib
import heapq
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace

from megatron_distkv.clock import SystemClock
from megatron_distkv.errors import LedgerUnavailable, SupersededError
from megatron_distkv.ledger.pool_snapshot import PoolChanges, PoolReader, PoolSnapshot, ReadPosition
from megatron_distkv.ledger.pool_state import PoolState, StoredMember
from megatron_distkv.ledger.records import (
    CreditorOffer,
    HeartbeatReply,
    InstanceRecord,
    InstanceReport,
    InstanceState,
    Loan,
    LoanState,
    MoveOrder,
    Recall,
    Registration,
    heartbeat_interval_s,
)
from megatron_distkv.messages import Refusal
from megatron_distkv.rblock import InstanceId, LoanKey


class MemoryLedger:
    """Thread-safe. `clock_ms`: the time by the calendar, as a server has it; by default the system's."""

    def __init__(self, clock_ms: Callable[[], int] | None = None) -> None:
        self._clock_ms = clock_ms or SystemClock().unix_ms
        self._lock = threading.RLock()
        self._state = PoolState(self._clock_ms)

    def lose_everything(self) -> None:
        """What a restart of the server without its data does."""
        self._state = PoolState(self._clock_ms)

    def close(self) -> None:
        pass

    # Members

    def register(
        self, instance: InstanceId, address: str, total_rblocks: int, reserved_rblocks: int, lease_s: float, *,
        epoch: int = 0, generation: str = "", info: Mapping[str, str] | None = None,
    ) -> Registration:  # fmt: skip
        with self._operation() as state:
            old = state.members.get(instance)
            if old is not None and 0 < epoch < old.record.epoch:
                raise SupersededError(f"a newer {instance} has registered (epoch {old.record.epoch}, this is {epoch})")
            if old is not None:
                state.bury(instance, "replaced")
            state.generation = state.generation or f"g{self._clock_ms()}"
            state.epoch = state.epoch or self._clock_ms()
            is_survivor = epoch > 0 and generation != state.generation
            new_epoch = epoch if is_survivor else state.epoch + 1
            state.epoch = max(state.epoch, new_epoch)
            record = InstanceRecord(
                instance, new_epoch, address, total_rblocks, reserved_rblocks, 0, 0, 0, InstanceState.UP, 0, 0, 0, 0, 0,
                dict(info or {}),
            )  # fmt: skip
            state.left.pop(instance, None)
            state.members[instance] = StoredMember(record, state.lease_until(lease_s), state.next_version())
            state.note("join", instance=instance, epoch=str(new_epoch))
            return Registration(new_epoch, state.generation)

    def heartbeat(self, instance: InstanceId, epoch: int, report: InstanceReport, lease_s: float) -> HeartbeatReply:
        with self._operation() as state:
            if not state.is_live(instance, epoch):
                state.expire_a_few()
                return HeartbeatReply(known=False)
            member = state.members[instance]
            state.take_report(member, report)
            member.lease_end_ms = state.lease_until(lease_s)
            state.expire_a_few()
            moves, member.moves = tuple(member.moves), []
            sums = state.current_sums()
            return HeartbeatReply(
                known=True,
                generation=state.generation,
                lent=member.record.lent,
                borrowed=member.record.borrowed,
                free=member.record.free_to_lend,
                lendable_now=max(0, sums.offered - member.offered),
                lending_caps=max(0, sums.caps - member.cap),
                num_members=sums.members,
                interval_s=heartbeat_interval_s(sums.members),
                recalls=state.recalls_of(instance),
                moves=moves,
            )

    def describe(self, instance: InstanceId, epoch: int, info: Mapping[str, str]) -> bool:
        with self._operation() as state:
            if not state.is_live(instance, epoch):
                return False
            state.update(state.members[instance], info=dict(info))
            return True

    def deregister(self, instance: InstanceId, epoch: int) -> None:
        with self._operation() as state:
            if state.is_live(instance, epoch):
                state.bury(instance, "leave")

    def expire(self, limit: int = 64) -> list[InstanceId]:
        with self._operation() as state:
            return state.expire(limit)

    # Loans

    def recommend(self, debtor: InstanceId, limit: int, skip: int = 0) -> list[CreditorOffer]:
        with self._operation() as state:
            state.expire_a_few()
            able = [x for x in state.members.values() if x.offered > 0 and x.record.instance != debtor]
            able = [x for x in able if x.lease_end_ms > state.now_ms]
            able.sort(key=lambda member: (member.offered, member.record.instance), reverse=True)
            records = [member.record for member in able[skip : skip + limit]]
            return [CreditorOffer(x.instance, x.epoch, x.address, x.free_to_lend, x.info) for x in records]

    def borrow(
        self, loan_id: LoanKey, debtor: InstanceId, debtor_epoch: int, creditor: InstanceId, creditor_epoch: int,
        num_rblocks: int, pending_s: float,
    ) -> Refusal | None:  # fmt: skip
        with self._operation() as state:
            loan = Loan(loan_id, debtor, debtor_epoch, creditor, creditor_epoch, num_rblocks, LoanState.PENDING)
            known = state.loans.get(loan_id)
            if known is not None:
                return None if replace(known, state=LoanState.PENDING) == loan else Refusal.CONFLICT
            refusal = state.why_not(loan)
            if refusal is None:
                state.add(loan)
                state.pending_until_ms[loan_id] = state.now_ms + int(pending_s * 1000)
            return refusal

    def accept(self, loan_id: LoanKey, creditor: InstanceId, creditor_epoch: int) -> Refusal | None:
        with self._operation() as state:
            loan = state.loans.get(loan_id)
            if loan is None:
                return Refusal.UNKNOWN_LOAN
            if (loan.creditor, loan.creditor_epoch) != (creditor, creditor_epoch):
                return Refusal.STALE_CREDITOR
            if not state.is_live(creditor, creditor_epoch):
                return Refusal.STALE_CREDITOR
            state.pending_until_ms.pop(loan_id, None)
            if loan.state is LoanState.PENDING:
                state.loans[loan_id] = replace(loan, state=LoanState.ACTIVE)
                state.members[creditor].version = state.next_version()
            return None

    def release(self, loan_id: LoanKey, instance: InstanceId, epoch: int) -> int:
        with self._operation() as state:
            loan = state.loans.get(loan_id)
            if loan is None:
                return 0
            sides = ((loan.debtor, loan.debtor_epoch), (loan.creditor, loan.creditor_epoch))
            return state.drop(loan_id, "release") if (instance, epoch) in sides else 0

    def reclaim(self, creditor: InstanceId, epoch: int, num_rblocks: int) -> list[Recall]:
        with self._operation() as state:
            if not state.is_live(creditor, epoch):
                return []
            recalls: list[Recall] = []
            for loan in sorted(state.credits_of(creditor), key=lambda loan: (-loan.num_rblocks, loan.key)):
                if num_rblocks <= 0:
                    break
                state.recalled.add(loan.key)
                recalls.append(Recall(loan.key, loan.debtor, loan.num_rblocks))
                num_rblocks -= loan.num_rblocks
            return recalls

    def restore(
        self, loan_id: LoanKey, debtor: InstanceId, debtor_epoch: int, creditor: InstanceId, creditor_epoch: int,
        num_rblocks: int,
    ) -> Refusal | None:  # fmt: skip
        with self._operation() as state:
            loan = Loan(loan_id, debtor, debtor_epoch, creditor, creditor_epoch, num_rblocks, LoanState.ACTIVE)
            known = state.loans.get(loan_id)
            if known is not None:
                return None if replace(known, state=LoanState.ACTIVE) == loan else Refusal.CONFLICT
            refusal = state.why_not_fenced(loan)
            if refusal is None:
                record = state.members[creditor].record
                refusal = Refusal.CAP if record.lendable_at_most < record.lent + num_rblocks else None
            if refusal is None:
                state.add(loan)
            return refusal

    def transfer(
        self, loan_id: LoanKey, new_loan_id: LoanKey, new_debtor: InstanceId, new_debtor_epoch: int,
        creditor: InstanceId, creditor_epoch: int,
    ) -> Refusal | None:  # fmt: skip
        with self._operation() as state:
            sides = (new_debtor, new_debtor_epoch, creditor, creditor_epoch)
            known = state.loans.get(new_loan_id)
            if known is not None:
                its_sides = (known.debtor, known.debtor_epoch, known.creditor, known.creditor_epoch)
                return None if its_sides == sides else Refusal.CONFLICT
            old = state.loans.get(loan_id)
            if old is None:
                return Refusal.UNKNOWN_LOAN
            if (old.creditor, old.creditor_epoch) != (creditor, creditor_epoch):
                return Refusal.STALE_CREDITOR
            new = replace(
                old, key=new_loan_id, debtor=new_debtor, debtor_epoch=new_debtor_epoch, state=LoanState.ACTIVE
            )
            refusal = state.why_not_transfer(new)
            if refusal is None:
                state.drop(loan_id, "transfer", new_debtor=new_debtor)
                state.add(new)
            return refusal

    def loans_of(self, creditor: InstanceId, epoch: int) -> list[Loan]:
        with self._operation() as state:
            if not state.is_live(creditor, epoch):
                raise LedgerUnavailable(f"the ledger does not know {creditor} (epoch {epoch}) now")
            return state.credits_of(creditor)

    def known_loans(self, loan_ids: Collection[LoanKey]) -> set[LoanKey]:
        with self._operation() as state:
            return state.loans.keys() & set(loan_ids)

    # The pool

    def changes(
        self, since: int, limit: int = 256, *, with_loans: bool = True, with_placements: bool = True
    ) -> PoolChanges:
        with self._operation() as state:
            state.expire_a_few()
            start, position = ReadPosition.unpack(since)
            known_from = start or position
            is_whole = position <= 0 or known_from < state.horizon or max(known_from, position) > state.version
            if is_whole:
                start, position = state.version, 0
            changed = ((x.version, x.record.instance) for x in state.members.values() if x.version > position)
            left = ((version, name) for name, version in state.left.items() if version > max(position, start))
            page = heapq.nsmallest(limit + 1, (*changed, *left))
            has_more, page = len(page) > limit, page[:limit]
            start, position = (start, page[-1][0]) if has_more else (0, state.version)
            return PoolChanges(
                state.generation,
                ReadPosition.pack(start, position),
                state.now_ms,
                is_whole,
                has_more,
                tuple(state.told(instance, with_loans, with_placements) for _, instance in page),
            )

    def snapshot(self) -> PoolSnapshot:
        return PoolReader(self.changes).snapshot()

    def lead(self, candidate: str, lease_s: float) -> bool:
        with self._operation() as state:
            leader, until_ms = state.leader
            if leader != candidate and until_ms > state.now_ms:
                return False
            state.leader = (candidate, state.now_ms + int(lease_s * 1000))
            return True

    def publish_moves(self, leader: str, moves: Sequence[MoveOrder]) -> bool:
        with self._operation() as state:
            if state.leader[0] != leader or state.leader[1] <= state.now_ms:
                return False
            for move in moves:
                if move.source in state.members:
                    state.members[move.source].moves.append(move)
            return True

    def events(self, count: int) -> list[dict[str, str]]:
        with self._lock:
            return list(self._state.events)[-count:]

    @contextlib.contextmanager
    def _operation(self) -> Iterator[PoolState]:
        """One at a time."""
        with self._lock:
            self._state.follow_clock()
            yield self._state
