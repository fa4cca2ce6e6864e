"""What this gateway has given to instances: fresher than any heartbeat."""

from collections import Counter

from megatron_distkv.ledger import InstanceRecord, PoolSnapshot
from megatron_distkv.rblock import num_rblocks_for
from megatron_distkv.server.attempt import Attempt


class InFlight:
    """Requests with their instances. One that has been promised room counts, though it may not be sent yet."""

    def __init__(self) -> None:
        self._instances: dict[Attempt, InstanceRecord] = {}
        self._counts: Counter[str] = Counter()

    def add(self, attempt: Attempt, record: InstanceRecord) -> None:
        self._instances[attempt] = record
        self._counts[record.instance] += 1

    def remove(self, attempt: Attempt) -> None:
        record = self._instances.pop(attempt, None)
        if record is not None:
            self._counts[record.instance] -= 1

    def num_at(self, instance: str) -> int:
        return self._counts[instance]

    def promised_rblocks(self, snapshot: PoolSnapshot) -> Counter[str]:
        """By instance: what its requests still need for the tokens that they have, beside what they hold already."""
        held: Counter[str] = Counter()
        for entries in snapshot.placements.values():
            for entry in entries:
                held[entry.request_id] += entry.num_rblocks
        promised: Counter[str] = Counter()
        for attempt, record in self._instances.items():
            needed = num_rblocks_for(attempt.num_tokens_now, int(record.info["rblock_size"]))
            promised[record.instance] += max(0, needed - held[attempt.request_id])
        return promised
