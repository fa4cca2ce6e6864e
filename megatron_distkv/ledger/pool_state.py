"""A pool's state in this process's memory, and its rules: what scripts/_common.lua is for the Redis ledger."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from megatron_distkv.ledger.pool_snapshot import MemberChange
from megatron_distkv.ledger.records import (
    InstanceRecord,
    InstanceReport,
    InstanceState,
    Loan,
    MoveOrder,
    Recall,
    RequestPlacementEntry,
    in_order,
)
from megatron_distkv.messages import Refusal
from megatron_distkv.rblock import InstanceId, LoanKey

# As in scripts/_common.lua.
EXPIRE_PER_CALL, MAX_EVENTS, MAX_TOMBSTONES = 4, 4096, 1024
SUMS_AGE_MS_PER_MEMBER = 0.25


@dataclass
class StoredMember:
    record: InstanceRecord  # its lease_left_ms is filled in when it is told
    lease_end_ms: int
    version: int
    placements: tuple[RequestPlacementEntry, ...] = ()
    moves: list[MoveOrder] = field(default_factory=list)

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
class PoolState:
    """What a restart of the server without its data loses, and what may become of it.

    Methods are called by one operation at a time, after `follow_clock`.
    """

    clock_ms: Callable[[], int]
    now_ms: int = 0  # the pool's own time
    is_later: bool = True  # than at the operation before
    seen_ms: int | None = None  # the clock, at the last operation
    lease_ms: int = 0  # of the last report
    epoch: int = 0
    generation: str = ""
    version: int = 0
    horizon: int = 0
    sums: _Sums | None = None  # as last counted
    leader: tuple[str, int] = ("", 0)
    members: dict[InstanceId, StoredMember] = field(default_factory=dict)
    left: dict[InstanceId, int] = field(default_factory=dict)  # the version of that; the oldest first
    loans: dict[LoanKey, Loan] = field(default_factory=dict)
    pending_until_ms: dict[LoanKey, int] = field(default_factory=dict)
    recalled: set[LoanKey] = field(default_factory=set)
    events: deque[dict[str, str]] = field(default_factory=lambda: deque(maxlen=MAX_EVENTS))

    def follow_clock(self) -> None:
        """The pool's own time follows the clock, but does not jump with it (as in _common.lua)."""
        wall_ms = self.clock_ms()
        passed_ms = 0 if self.seen_ms is None else max(0, wall_ms - self.seen_ms)
        if self.lease_ms:
            passed_ms = min(passed_ms, self.lease_ms // 2)
        self.now_ms = wall_ms if self.seen_ms is None else self.now_ms + passed_ms
        self.is_later = self.seen_ms is None or passed_ms > 0
        self.seen_ms = wall_ms

    def next_version(self) -> int:
        if self.version == 0:
            self.version = self.horizon = self.clock_ms() * 1000
        self.version += 1
        return self.version

    def lease_until(self, lease_s: float) -> int:
        self.lease_ms = int(lease_s * 1000)
        return self.now_ms + self.lease_ms

    def is_live(self, instance: InstanceId, epoch: int) -> bool:
        member = self.members.get(instance)
        return member is not None and member.record.epoch == epoch and member.lease_end_ms > self.now_ms

    def update(self, member: StoredMember, **fields: object) -> None:
        changed = replace(member.record, **fields)  # type: ignore[arg-type]
        if changed != member.record:
            member.record, member.version = changed, self.next_version()

    def take_report(self, member: StoredMember, report: InstanceReport) -> None:
        record = replace(
            member.record,
            local_used=report.local_used_rblocks,
            state=report.state,
            num_running=report.num_running,
            num_waiting=report.num_waiting,
            max_request_tokens=report.max_request_tokens,
            prefill_tokens_left=report.prefill_tokens_left,
            counted=member.record.counted if report.counted is None else report.counted,
        )
        placements = member.placements if report.placements is None else in_order(report.placements)
        if (record, placements) != (member.record, member.placements):
            member.record, member.placements, member.version = record, placements, self.next_version()

    def told(self, instance: InstanceId, with_loans: bool, with_placements: bool) -> MemberChange:
        member = self.members.get(instance)
        if member is None:
            return MemberChange(instance)
        return MemberChange(
            instance,
            replace(member.record, lease_left_ms=member.lease_end_ms - self.now_ms),
            tuple(self.credits_of(instance)) if with_loans else (),
            member.placements if with_placements else (),
        )

    def current_sums(self) -> _Sums:
        """Counted anew when they are too old."""
        sums = self.sums
        if sums is None or not 0 <= self.now_ms - sums.at_ms <= sums.members * SUMS_AGE_MS_PER_MEMBER:
            members = self.members.values()
            offered, caps = sum(x.offered for x in members), sum(x.cap for x in members)
            sums = self.sums = _Sums(self.now_ms, offered, caps, len(members))
        return sums

    def credits_of(self, creditor: InstanceId) -> list[Loan]:
        return sorted((x for x in self.loans.values() if x.creditor == creditor), key=lambda x: x.key)

    def recalls_of(self, debtor: InstanceId) -> tuple[Recall, ...]:
        loans = (self.loans[loan_id] for loan_id in sorted(self.recalled))
        return tuple(Recall(x.key, x.debtor, x.num_rblocks) for x in loans if x.debtor == debtor)

    def why_not(self, loan: Loan) -> Refusal | None:
        """Why this loan cannot begin."""
        refusal = self.why_not_fenced(loan)
        if refusal is not None:
            return refusal
        record = self.members[loan.creditor].record
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
        members = self.members
        has_both = members[loan.creditor].record.borrowed > 0 and members[loan.debtor].record.lent > 0
        return Refusal.IN_DEBT if has_both else None

    def add(self, loan: Loan) -> None:
        self.loans[loan.key] = loan
        self._change_sums(loan, loan.num_rblocks)
        self.note("loan", **_terms(loan))

    def drop(self, loan_id: LoanKey, why: str, **more: str) -> int:
        loan = self.loans.pop(loan_id)
        self.pending_until_ms.pop(loan_id, None)
        self.recalled.discard(loan_id)
        self._change_sums(loan, -loan.num_rblocks)
        self.note(why, **_terms(loan), **more)
        return loan.num_rblocks

    def _change_sums(self, loan: Loan, num: int) -> None:
        creditor, debtor = self.members[loan.creditor], self.members[loan.debtor]
        self.update(creditor, lent=creditor.record.lent + num)
        self.update(debtor, borrowed=debtor.record.borrowed + num)

    def bury(self, instance: InstanceId, why: str) -> None:
        """All its loans are void, first those of which it is the debtor."""
        loans = sorted(self.loans.values(), key=lambda loan: (loan.creditor == instance, loan.key))
        for loan in loans:
            if instance in (loan.debtor, loan.creditor):
                self.drop(loan.key, "void")
        del self.members[instance]
        self.left[instance] = self.next_version()
        if len(self.left) > MAX_TOMBSTONES:
            self.horizon = self.left.pop(next(iter(self.left)))
        self.note(why, instance=instance)

    def expire(self, limit: int) -> list[InstanceId]:
        ended = sorted((member.lease_end_ms, instance) for instance, member in self.members.items())
        dead = [instance for end_ms, instance in ended if end_ms <= self.now_ms][:limit]
        for instance in dead:
            self.bury(instance, "dead")
        overdue = sorted((until_ms, loan_id) for loan_id, until_ms in self.pending_until_ms.items())
        for loan_id in [loan_id for until_ms, loan_id in overdue if until_ms <= self.now_ms][:limit]:
            self.drop(loan_id, "overdue")
        return dead

    def expire_a_few(self) -> None:
        """On the way of other operations; not twice in the same ms."""
        if self.is_later:
            self.expire(EXPIRE_PER_CALL)

    def note(self, event: str, **fields: str) -> None:
        self.events.append({"at_ms": str(self.clock_ms()), "event": event, **fields})


def _terms(loan: Loan) -> dict[str, str]:
    num = str(loan.num_rblocks)
    return {"loan": loan.key, "debtor": loan.debtor, "creditor": loan.creditor, "rblocks": num}
