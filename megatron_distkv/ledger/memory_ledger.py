"""The ledger in this process's memory: for one lonely instance, for tests, and as the plain statement of the rules.

Same semantics as the Redis scripts, line for line; one stateful test drives both. Contract: DebtLedger.
"""

import contextlib
import heapq
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from megatron_distkv.clock import SystemClock
from megatron_distkv.errors import LedgerUnavailable, SupersededError
from megatron_distkv.ledger.pool_snapshot import MemberChange, PoolChanges, PoolReader, PoolSnapshot, ReadPosition
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
    heartbeat_interval_s,
    in_order,
)
from megatron_distkv.messages import Refusal
from megatron_distkv.rblock import InstanceId, LoanKey

# As in scripts/_common.lua.
EXPIRE_PER_CALL, MAX_EVENTS, MAX_TOMBSTONES = 4, 4096, 1024
SUMS_AGE_MS_PER_MEMBER = 0.25


@dataclass
class _Member:
    record: InstanceRecord  # its lease_left_ms is filled in when it is told
    lease_end_ms: int
    version: int
    placements: tuple[RequestPlacementEntry, ...] = ()
    moves: list[Move] = field(default_factory=list)

    @property
    def offered(self) -> int:
        """rBlocks that it would lend now."""
        record = self.record
        may_lend = record.state is InstanceState.UP and record.borrowed == 0
        return max(0, record.free_to_lend) if may_lend else 0

    @property
    def cap(self) -> int:
        return self.record.lendable_at_most if self.record.state is InstanceState.UP else 0


@dataclass(frozen=True)
class _Sums:
    """Of all members, counted at a time."""

    at_ms: int
    offered: int
    caps: int
    members: int


@dataclass
class _Data:
    """What a restart of the server without its data loses."""

    now_ms: int = 0  # the pool's own time
    is_later: bool = True  # than at the operation before
    seen_ms: int | None = None  # the clock, at the last operation
    lease_ms: int = 0  # of the last report
    epoch: int = 0
    generation: str = ""
    version: int = 0
    horizon: int = 0
    sums: _Sums | None = None
    leader: tuple[str, int] = ("", 0)
    members: dict[InstanceId, _Member] = field(default_factory=dict)
    left: dict[InstanceId, int] = field(default_factory=dict)  # the version of that; the oldest first
    loans: dict[LoanKey, Loan] = field(default_factory=dict)
    pending_until_ms: dict[LoanKey, int] = field(default_factory=dict)
    recalled: set[LoanKey] = field(default_factory=set)
    events: deque[dict[str, str]] = field(default_factory=lambda: deque(maxlen=MAX_EVENTS))


class MemoryLedger:
    """Thread-safe. `clock_ms`: the time by the calendar, as a server has it; by default the system's."""

    def __init__(self, clock_ms: Callable[[], int] | None = None) -> None:
        self._clock_ms = clock_ms or SystemClock().unix_ms
        self._lock = threading.RLock()
        self._data = _Data()

    def lose_everything(self) -> None:
        """What a restart of the server without its data does."""
        self._data = _Data()

    def close(self) -> None:
        pass

    # Members

    def register(
        self, instance: InstanceId, address: str, total_rblocks: int, reserved_rblocks: int, lease_s: float, *,
        epoch: int = 0, generation: str = "", info: Mapping[str, str] | None = None,
    ) -> Registration:  # fmt: skip
        with self._operation() as data:
            old = data.members.get(instance)
            if old is not None and 0 < epoch < old.record.epoch:
                raise SupersededError(f"a newer {instance} has registered (epoch {old.record.epoch}, this is {epoch})")
            if old is not None:
                self._bury(instance, "replaced")
            data.generation = data.generation or f"g{self._clock_ms()}"
            data.epoch = data.epoch or self._clock_ms()
            is_survivor = epoch > 0 and generation != data.generation
            new_epoch = epoch if is_survivor else data.epoch + 1
            data.epoch = max(data.epoch, new_epoch)
            record = InstanceRecord(
                instance, new_epoch, address, total_rblocks, reserved_rblocks, 0, 0, 0, InstanceState.UP, 0, 0, 0, 0,
                dict(info or {}),
            )  # fmt: skip
            data.left.pop(instance, None)
            data.members[instance] = _Member(record, self._lease_until(lease_s), self._next_version())
            self._note("join", instance=instance, epoch=str(new_epoch))
            return Registration(new_epoch, data.generation)

    def heartbeat(self, instance: InstanceId, epoch: int, report: InstanceReport, lease_s: float) -> HeartbeatReply:
        with self._operation() as data:
            if not self._is_live(instance, epoch):
                self._expire_a_few()
                return HeartbeatReply(known=False)
            member = data.members[instance]
            self._take_report(member, report)
            member.lease_end_ms = self._lease_until(lease_s)
            self._expire_a_few()
            moves, member.moves = tuple(member.moves), []
            sums = self._sums()
            return HeartbeatReply(
                known=True,
                generation=data.generation,
                lent=member.record.lent,
                borrowed=member.record.borrowed,
                free=member.record.free_to_lend,
                lendable_now=max(0, sums.offered - member.offered),
                lending_caps=max(0, sums.caps - member.cap),
                num_members=sums.members,
                interval_s=heartbeat_interval_s(sums.members),
                recalls=self._recalls_of(instance),
                moves=moves,
            )

    def describe(self, instance: InstanceId, epoch: int, info: Mapping[str, str]) -> bool:
        with self._operation() as data:
            if not self._is_live(instance, epoch):
                return False
            self._update(data.members[instance], info=dict(info))
            return True

    def deregister(self, instance: InstanceId, epoch: int) -> None:
        with self._operation():
            if self._is_live(instance, epoch):
                self._bury(instance, "leave")

    def expire(self, limit: int = 64) -> list[InstanceId]:
        with self._operation():
            return self._expire(limit)

    # Loans

    def recommend(self, debtor: InstanceId, limit: int, skip: int = 0) -> list[Creditor]:
        with self._operation() as data:
            self._expire_a_few()
            able = [x for x in data.members.values() if x.offered > 0 and x.record.instance != debtor]
            able = [x for x in able if x.lease_end_ms > data.now_ms]
            able.sort(key=lambda member: (member.offered, member.record.instance), reverse=True)
            records = [member.record for member in able[skip : skip + limit]]
            return [Creditor(x.instance, x.epoch, x.address, x.free_to_lend, x.info) for x in records]

    def borrow(
        self, loan_id: LoanKey, debtor: InstanceId, debtor_epoch: int, creditor: InstanceId, creditor_epoch: int,
        num_rblocks: int, pending_s: float,
    ) -> Refusal | None:  # fmt: skip
        with self._operation() as data:
            loan = Loan(loan_id, debtor, debtor_epoch, creditor, creditor_epoch, num_rblocks, LoanState.PENDING)
            known = data.loans.get(loan_id)
            if known is not None:
                return None if replace(known, state=LoanState.PENDING) == loan else Refusal.CONFLICT
            refusal = self._why_not(loan)
            if refusal is None:
                self._add(loan)
                data.pending_until_ms[loan_id] = data.now_ms + int(pending_s * 1000)
            return refusal

    def accept(self, loan_id: LoanKey, creditor: InstanceId, creditor_epoch: int) -> Refusal | None:
        with self._operation() as data:
            loan = data.loans.get(loan_id)
            if loan is None:
                return Refusal.UNKNOWN_LOAN
            if (loan.creditor, loan.creditor_epoch) != (creditor, creditor_epoch):
                return Refusal.STALE_CREDITOR
            if not self._is_live(creditor, creditor_epoch):
                return Refusal.STALE_CREDITOR
            data.pending_until_ms.pop(loan_id, None)
            if loan.state is LoanState.PENDING:
                data.loans[loan_id] = replace(loan, state=LoanState.ACTIVE)
                data.members[creditor].version = self._next_version()
            return None

    def release(self, loan_id: LoanKey, instance: InstanceId, epoch: int) -> int:
        with self._operation() as data:
            loan = data.loans.get(loan_id)
            if loan is None:
                return 0
            sides = ((loan.debtor, loan.debtor_epoch), (loan.creditor, loan.creditor_epoch))
            return self._drop(loan_id, "release") if (instance, epoch) in sides else 0

    def reclaim(self, creditor: InstanceId, epoch: int, num_rblocks: int) -> list[Recall]:
        with self._operation() as data:
            if not self._is_live(creditor, epoch):
                return []
            recalls: list[Recall] = []
            for loan in sorted(self._credits_of(creditor), key=lambda loan: (-loan.num_rblocks, loan.key)):
                if num_rblocks <= 0:
                    break
                data.recalled.add(loan.key)
                recalls.append(Recall(loan.key, loan.debtor, loan.num_rblocks))
                num_rblocks -= loan.num_rblocks
            return recalls

    def restore(
        self, loan_id: LoanKey, debtor: InstanceId, debtor_epoch: int, creditor: InstanceId, creditor_epoch: int,
        num_rblocks: int,
    ) -> Refusal | None:  # fmt: skip
        with self._operation() as data:
            loan = Loan(loan_id, debtor, debtor_epoch, creditor, creditor_epoch, num_rblocks, LoanState.ACTIVE)
            known = data.loans.get(loan_id)
            if known is not None:
                return None if replace(known, state=LoanState.ACTIVE) == loan else Refusal.CONFLICT
            refusal = self._why_not_fenced(loan)
            if refusal is None:
                record = data.members[creditor].record
                refusal = Refusal.CAP if record.lendable_at_most < record.lent + num_rblocks else None
            if refusal is None:
                self._add(loan)
            return refusal

    def transfer(
        self, loan_id: LoanKey, new_loan_id: LoanKey, new_debtor: InstanceId, new_debtor_epoch: int,
        creditor: InstanceId, creditor_epoch: int,
    ) -> Refusal | None:  # fmt: skip
        with self._operation() as data:
            sides = (new_debtor, new_debtor_epoch, creditor, creditor_epoch)
            known = data.loans.get(new_loan_id)
            if known is not None:
                its_sides = (known.debtor, known.debtor_epoch, known.creditor, known.creditor_epoch)
                return None if its_sides == sides else Refusal.CONFLICT
            old = data.loans.get(loan_id)
            if old is None:
                return Refusal.UNKNOWN_LOAN
            if (old.creditor, old.creditor_epoch) != (creditor, creditor_epoch):
                return Refusal.STALE_CREDITOR
            new = replace(
                old, key=new_loan_id, debtor=new_debtor, debtor_epoch=new_debtor_epoch, state=LoanState.ACTIVE
            )
            refusal = self._why_not_transfer(new)
            if refusal is None:
                self._drop(loan_id, "transfer", new_debtor=new_debtor)
                self._add(new)
            return refusal

    def loans_of(self, creditor: InstanceId, epoch: int) -> list[Loan]:
        with self._operation():
            if not self._is_live(creditor, epoch):
                raise LedgerUnavailable(f"the ledger does not know {creditor} (epoch {epoch}) now")
            return self._credits_of(creditor)

    def known_loans(self, loan_ids: Collection[LoanKey]) -> set[LoanKey]:
        with self._operation() as data:
            return data.loans.keys() & set(loan_ids)

    # The pool

    def changes(
        self, since: int, limit: int = 256, *, with_loans: bool = True, with_placements: bool = True
    ) -> PoolChanges:
        with self._operation() as data:
            self._expire_a_few()
            start, position = ReadPosition.unpack(since)
            known_from = start or position
            is_whole = position <= 0 or known_from < data.horizon or max(known_from, position) > data.version
            if is_whole:
                start, position = data.version, 0
            changed = ((x.version, x.record.instance) for x in data.members.values() if x.version > position)
            left = ((version, name) for name, version in data.left.items() if version > max(position, start))
            page = heapq.nsmallest(limit + 1, (*changed, *left))
            has_more, page = len(page) > limit, page[:limit]
            start, position = (start, page[-1][0]) if has_more else (0, data.version)
            return PoolChanges(
                data.generation,
                ReadPosition.pack(start, position),
                data.now_ms,
                is_whole,
                has_more,
                tuple(self._told(instance, with_loans, with_placements) for _, instance in page),
            )

    def snapshot(self) -> PoolSnapshot:
        return PoolReader(self.changes).snapshot()

    def lead(self, candidate: str, lease_s: float) -> bool:
        with self._operation() as data:
            leader, until_ms = data.leader
            if leader != candidate and until_ms > data.now_ms:
                return False
            data.leader = (candidate, data.now_ms + int(lease_s * 1000))
            return True

    def publish_moves(self, leader: str, moves: Sequence[Move]) -> bool:
        with self._operation() as data:
            if data.leader[0] != leader or data.leader[1] <= data.now_ms:
                return False
            for move in moves:
                if move.source in data.members:
                    data.members[move.source].moves.append(move)
            return True

    def events(self, count: int) -> list[dict[str, str]]:
        with self._lock:
            return list(self._data.events)[-count:]

    # The rules

    @contextlib.contextmanager
    def _operation(self) -> Iterator[_Data]:
        """One at a time. The pool's own time follows the clock, but does not jump with it (as in _common.lua)."""
        with self._lock:
            data, wall_ms = self._data, self._clock_ms()
            passed_ms = 0 if data.seen_ms is None else max(0, wall_ms - data.seen_ms)
            if data.lease_ms:
                passed_ms = min(passed_ms, data.lease_ms // 2)
            data.now_ms = wall_ms if data.seen_ms is None else data.now_ms + passed_ms
            data.is_later = data.seen_ms is None or passed_ms > 0
            data.seen_ms = wall_ms
            yield data

    def _next_version(self) -> int:
        data = self._data
        if data.version == 0:
            data.version = data.horizon = self._clock_ms() * 1000
        data.version += 1
        return data.version

    def _lease_until(self, lease_s: float) -> int:
        self._data.lease_ms = int(lease_s * 1000)
        return self._data.now_ms + self._data.lease_ms

    def _is_live(self, instance: InstanceId, epoch: int) -> bool:
        member = self._data.members.get(instance)
        return member is not None and member.record.epoch == epoch and member.lease_end_ms > self._data.now_ms

    def _update(self, member: _Member, **fields: object) -> None:
        changed = replace(member.record, **fields)  # type: ignore[arg-type]
        if changed != member.record:
            member.record, member.version = changed, self._next_version()

    def _take_report(self, member: _Member, report: InstanceReport) -> None:
        record = replace(
            member.record,
            local_used=report.local_used_rblocks,
            state=report.state,
            num_running=report.num_running,
            num_waiting=report.num_waiting,
            max_request_tokens=report.max_request_tokens,
        )
        placements = member.placements if report.placements is None else in_order(report.placements)
        if (record, placements) != (member.record, member.placements):
            member.record, member.placements, member.version = record, placements, self._next_version()

    def _told(self, instance: InstanceId, with_loans: bool, with_placements: bool) -> MemberChange:
        member = self._data.members.get(instance)
        if member is None:
            return MemberChange(instance)
        return MemberChange(
            instance,
            replace(member.record, lease_left_ms=member.lease_end_ms - self._data.now_ms),
            tuple(self._credits_of(instance)) if with_loans else (),
            member.placements if with_placements else (),
        )

    def _sums(self) -> _Sums:
        data, sums = self._data, self._data.sums
        if sums is None or not 0 <= data.now_ms - sums.at_ms <= sums.members * SUMS_AGE_MS_PER_MEMBER:
            members = data.members.values()
            offered, caps = sum(x.offered for x in members), sum(x.cap for x in members)
            sums = data.sums = _Sums(data.now_ms, offered, caps, len(members))
        return sums

    def _credits_of(self, creditor: InstanceId) -> list[Loan]:
        return sorted((x for x in self._data.loans.values() if x.creditor == creditor), key=lambda x: x.key)

    def _recalls_of(self, debtor: InstanceId) -> tuple[Recall, ...]:
        loans = (self._data.loans[loan_id] for loan_id in sorted(self._data.recalled))
        return tuple(Recall(x.key, x.debtor, x.num_rblocks) for x in loans if x.debtor == debtor)

    def _why_not(self, loan: Loan) -> Refusal | None:
        """Why this loan cannot begin."""
        refusal = self._why_not_fenced(loan)
        if refusal is not None:
            return refusal
        record = self._data.members[loan.creditor].record
        if record.state is not InstanceState.UP:
            return Refusal.DRAINING
        if record.borrowed > 0:
            return Refusal.IN_DEBT
        if record.lendable_at_most - record.lent < loan.num_rblocks:
            return Refusal.CAP
        return Refusal.FULL if record.free_to_lend < loan.num_rblocks else None

    def _why_not_fenced(self, loan: Loan) -> Refusal | None:
        """Why its two sides cannot have any loan with each other now."""
        if loan.debtor == loan.creditor or loan.num_rblocks < 1:
            return Refusal.SELF
        if not self._is_live(loan.debtor, loan.debtor_epoch):
            return Refusal.STALE_DEBTOR
        return None if self._is_live(loan.creditor, loan.creditor_epoch) else Refusal.STALE_CREDITOR

    def _why_not_transfer(self, loan: Loan) -> Refusal | None:
        """Why this cannot take the place of a loan with another debtor."""
        refusal = self._why_not_fenced(loan)
        if refusal is not None:
            return refusal
        members = self._data.members
        has_both = members[loan.creditor].record.borrowed > 0 and members[loan.debtor].record.lent > 0
        return Refusal.IN_DEBT if has_both else None

    def _add(self, loan: Loan) -> None:
        self._data.loans[loan.key] = loan
        self._change_sums(loan, loan.num_rblocks)
        self._note("loan", **_terms(loan))

    def _drop(self, loan_id: LoanKey, why: str, **more: str) -> int:
        loan = self._data.loans.pop(loan_id)
        self._data.pending_until_ms.pop(loan_id, None)
        self._data.recalled.discard(loan_id)
        self._change_sums(loan, -loan.num_rblocks)
        self._note(why, **_terms(loan), **more)
        return loan.num_rblocks

    def _change_sums(self, loan: Loan, num: int) -> None:
        creditor, debtor = self._data.members[loan.creditor], self._data.members[loan.debtor]
        self._update(creditor, lent=creditor.record.lent + num)
        self._update(debtor, borrowed=debtor.record.borrowed + num)

    def _bury(self, instance: InstanceId, why: str) -> None:
        """All its loans are void, first those of which it is the debtor."""
        data = self._data
        loans = sorted(data.loans.values(), key=lambda loan: (loan.creditor == instance, loan.key))
        for loan in loans:
            if instance in (loan.debtor, loan.creditor):
                self._drop(loan.key, "void")
        del data.members[instance]
        data.left[instance] = self._next_version()
        if len(data.left) > MAX_TOMBSTONES:
            data.horizon = data.left.pop(next(iter(data.left)))
        self._note(why, instance=instance)

    def _expire(self, limit: int) -> list[InstanceId]:
        data = self._data
        ended = sorted((member.lease_end_ms, instance) for instance, member in data.members.items())
        dead = [instance for end_ms, instance in ended if end_ms <= data.now_ms][:limit]
        for instance in dead:
            self._bury(instance, "dead")
        overdue = sorted((until_ms, loan_id) for loan_id, until_ms in data.pending_until_ms.items())
        for loan_id in [loan_id for until_ms, loan_id in overdue if until_ms <= data.now_ms][:limit]:
            self._drop(loan_id, "overdue")
        return dead

    def _expire_a_few(self) -> None:
        """On the way of other operations; not twice in the same ms."""
        if self._data.is_later:
            self._expire(EXPIRE_PER_CALL)

    def _note(self, event: str, **fields: str) -> None:
        self._data.events.append({"at_ms": str(self._clock_ms()), "event": event, **fields})


def _terms(loan: Loan) -> dict[str, str]:
    num = str(loan.num_rblocks)
    return {"loan": loan.key, "debtor": loan.debtor, "creditor": loan.creditor, "rblocks": num}
