"""The pool as this process last saw it: typed members, what they owe each other, where requests lie."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from megatron_distkv.ledger import InstanceState, Loan, PoolSnapshot, RequestPlacementEntry
from megatron_distkv.pool.member import Member, MemberUnreadable, read_member
from megatron_distkv.rblock import HOST, InstanceId


@dataclass(frozen=True)
class Picture:
    """Immutable; what follows from it is worked out once.

    `placements` are keyed by the instance that owns the requests; `unreadable` says why, by member.
    """

    members: Mapping[InstanceId, Member]
    loans: tuple[Loan, ...]
    placements: Mapping[InstanceId, tuple[RequestPlacementEntry, ...]]
    unreadable: Mapping[InstanceId, str]

    @cached_property
    def live(self) -> tuple[Member, ...]:
        return tuple(member for member in self.members.values() if member.lease_left_ms > 0)

    @cached_property
    def up(self) -> tuple[Member, ...]:
        """Those that live and do not drain."""
        return tuple(member for member in self.live if member.state is InstanceState.UP)

    @cached_property
    def held_rblocks(self) -> Mapping[str, int]:
        """By request, wherever they lie."""
        held: Counter[str] = Counter()
        for entries in self.placements.values():
            for entry in entries:
                held[entry.request_id] += entry.num_rblocks
        return held

    @cached_property
    def longest_contexts(self) -> Mapping[InstanceId, int]:
        """Tokens, of each instance that takes requests: when nobody else uses any memory."""
        return {x.instance: self._longest_context(x) for x in self.up if x.takes_requests}

    def _longest_context(self, member: Member) -> int:
        num_rblocks = member.total + member.host_rblocks + self.lendable_to(member.instance)
        longest, limit = num_rblocks * member.rblock_size, member.info.max_context_tokens
        return longest if limit is None else min(longest, limit)

    def work_out(self) -> None:
        """What several readers will ask for: by who has the time for it, beside those who have not."""
        _ = self.longest_contexts, self.held_rblocks

    @cached_property
    def _sum_of_caps(self) -> int:
        return sum(member.lendable_at_most for member in self.up)

    def find(self, instance: InstanceId) -> Member | None:
        return self.members.get(instance)

    def lendable_to(self, instance: InstanceId) -> int:
        """rBlocks that all other live instances together lend at most, when none of them uses its own memory."""
        member = self.members.get(instance)
        is_counted = member is not None and member.lease_left_ms > 0 and member.state is InstanceState.UP
        return self._sum_of_caps - (member.lendable_at_most if member is not None and is_counted else 0)

    def used_host_rblocks(self, instance: InstanceId) -> int:
        return sum(entry.num_rblocks for entry in self.placements.get(instance, ()) if entry.holder == HOST)


def picture_of(snapshot: PoolSnapshot) -> Picture:
    """Members that cannot be read are left out, and named in `unreadable`."""
    members: dict[InstanceId, Member] = {}
    unreadable: dict[InstanceId, str] = dict(snapshot.unreadable)
    for record in snapshot.instances:
        try:
            members[record.instance] = read_member(record)
        except MemberUnreadable as error:
            unreadable[record.instance] = str(error)
    return Picture(members, snapshot.loans, snapshot.placements, unreadable)
