"""The ledger in this process's memory: for one lonely instance, for tests, and as the plain statement of the rules.

Same semantics as the Redis scripts, line for line; one stateful test drives both.
"""

from collections.abc import Sequence
from dataclasses import replace

from megatron_distkv.ledger.memory_loans import MemoryLoans
from megatron_distkv.ledger.memory_members import MemoryMembers
from megatron_distkv.ledger.pool_snapshot import PoolSnapshot
from megatron_distkv.ledger.records import Move


class MemoryLedger(MemoryMembers, MemoryLoans):
    """Members, their loans, and here the pool as a whole. `clock_ms` is injected by tests."""

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
