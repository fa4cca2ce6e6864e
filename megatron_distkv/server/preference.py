"""Which instance a request asks first."""

import itertools

from megatron_distkv.ledger import InstanceRecord
from megatron_distkv.rblock import num_rblocks_for
from megatron_distkv.server.attempt import Attempt
from megatron_distkv.server.in_flight import InFlight
from megatron_distkv.server.pool_view import PoolView


class Preference:
    def __init__(self, view: PoolView, in_flight: InFlight) -> None:
        self._view = view
        self._in_flight = in_flight
        self._turn = itertools.count()

    def order(self, attempt: Attempt) -> list[InstanceRecord]:
        """Instances that can hold all of it alone come first, the least busy of them; then those with most free."""
        records = [record for record in self._view.instances if attempt.pinned in (None, record.instance)]
        turn = next(self._turn)
        records = records[turn % max(1, len(records)) :] + records[: turn % max(1, len(records))]

        def rank(record: InstanceRecord) -> tuple[bool, int, int]:
            needed = num_rblocks_for(attempt.num_tokens_at_most, int(record.info["rblock_size"]))
            must_borrow = record.free < needed
            busy = self._in_flight.num_at(record.instance)
            return must_borrow, -record.free if must_borrow else busy, busy

        return sorted(records, key=rank)
