"""The pool as the ledger knows it: what has changed, and the whole."""

from collections.abc import Callable
from dataclasses import dataclass, field

from megatron_distkv.ledger.records import InstanceRecord, InstanceState, Loan, RequestPlacementEntry
from megatron_distkv.rblock import HOST, InstanceId


@dataclass(frozen=True)
class MemberChange:
    """A member as it is now: its record, the loans of which it is the creditor, where its requests' rBlocks lie.

    `unreadable`: one sentence on what of it cannot be read; that is left out here, and the rest is right.
    """

    instance: InstanceId
    record: InstanceRecord | None = None
    loans: tuple[Loan, ...] = ()
    placements: tuple[RequestPlacementEntry, ...] = ()
    unreadable: str = ""

    @property
    def has_left(self) -> bool:
        return self.record is None and not self.unreadable


@dataclass(frozen=True)
class PoolChanges:
    """One atomic read. `version` is to be asked from next time, and says nothing else; `has_more`: at once.

    `is_whole`: forget what you had, the members begin anew with these.
    """

    generation: str
    version: int
    taken_at_ms: int
    is_whole: bool
    has_more: bool
    members: tuple[MemberChange, ...]


class ReadPosition:
    """What `PoolChanges.version` holds: up to which version of the pool a reader has come.

    In the middle of a whole read also at which version that began: who left before the reader came to it is missing in
    it, and who leaves after that must still be known when the read goes on.
    """

    _BITS = 53  # versions are exact in a double

    @classmethod
    def pack(cls, began_at: int, version: int) -> int:
        return began_at << cls._BITS | version

    @classmethod
    def unpack(cls, position: int) -> tuple[int, int]:
        """Anything that was never packed reads from the beginning."""
        if position < 0 or position >> 2 * cls._BITS:
            return 0, 0
        return position >> cls._BITS, position & (1 << cls._BITS) - 1


@dataclass(frozen=True)
class PoolSnapshot:
    """The pool's members, read page by page: atomic where one page holds them all.

    `placements` are keyed by the instance that owns the requests, `unreadable` (sentences) by members of which
    something cannot be read.
    """

    generation: str
    taken_at_ms: int
    instances: tuple[InstanceRecord, ...]
    loans: tuple[Loan, ...]
    placements: dict[InstanceId, tuple[RequestPlacementEntry, ...]]
    unreadable: dict[InstanceId, str] = field(default_factory=dict)

    def find(self, instance: InstanceId) -> InstanceRecord | None:
        return next((record for record in self.instances if record.instance == instance), None)

    @property
    def live(self) -> tuple[InstanceRecord, ...]:
        return tuple(record for record in self.instances if record.lease_left_ms > 0)

    def lendable_to(self, instance: InstanceId) -> int:
        """rBlocks that all other live instances together lend at most, when none of them uses its own memory."""
        lenders = (record for record in self.live if record.instance != instance)
        return sum(record.lendable_at_most for record in lenders if record.state is InstanceState.UP)

    def used_host_rblocks(self, instance: InstanceId) -> int:
        return sum(entry.num_rblocks for entry in self.placements.get(instance, ()) if entry.holder == HOST)


class PoolReader:
    """Follows a pool by its changes. `changes` is `DebtLedger.changes`, with the kinds of things that are wanted."""

    def __init__(self, changes: Callable[[int], PoolChanges]) -> None:
        self._changes = changes
        self._version = 0
        self.members: dict[InstanceId, MemberChange] = {}

    def read(self) -> PoolChanges:
        """All that has changed since the last time; the last page of it. Raises LedgerUnavailable."""
        while True:
            page = self._changes(self._version)
            if page.is_whole:
                self.members.clear()
            for member in page.members:
                if member.has_left:
                    self.members.pop(member.instance, None)
                else:
                    self.members[member.instance] = member
            self._version = page.version
            if not page.has_more:
                return page

    def snapshot(self) -> PoolSnapshot:
        """As it is now. Raises LedgerUnavailable."""
        page = self.read()
        members = [self.members[instance] for instance in sorted(self.members)]
        loans = (loan for member in members for loan in member.loans)
        return PoolSnapshot(
            page.generation,
            page.taken_at_ms,
            tuple(member.record for member in members if member.record is not None),
            tuple(sorted(loans, key=lambda loan: loan.key)),
            {member.instance: member.placements for member in members if member.placements},
            {member.instance: member.unreadable for member in members if member.unreadable},
        )
