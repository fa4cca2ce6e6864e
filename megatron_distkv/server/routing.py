"""Who gets room, and where: which instance a request asks first."""

import itertools

from megatron_distkv.pool import Member
from megatron_distkv.rblock import num_rblocks_for
from megatron_distkv.server.attempt import Attempt
from megatron_distkv.server.capacity import InFlight
from megatron_distkv.server.pool_view import GatewayView


class RoutingPolicy:
    def __init__(self, view: GatewayView, in_flight: InFlight) -> None:
        self._view = view
        self._in_flight = in_flight
        self._turn = itertools.count()

    def order(self, attempt: Attempt) -> list[Member]:
        """Instances that can hold all of it alone come first, those with least work before them; then those with most
        free."""
        members = [member for member in self._view.instances if attempt.pinned in (None, member.instance)]
        turn = next(self._turn)
        members = members[turn % max(1, len(members)) :] + members[: turn % max(1, len(members))]

        def rank(member: Member) -> tuple[bool, int, int]:
            must_borrow = member.free < num_rblocks_for(attempt.num_tokens_at_most, member.rblock_size)
            work = self._in_flight.work_at(member.instance)
            return must_borrow, -member.free if must_borrow else work, work

        return sorted(members, key=rank)
