"""The debt ledger in Redis or Valkey."""

from collections.abc import Sequence
from typing import Any

from megatron_distkv.ledger.pool_snapshot import PoolSnapshot
from megatron_distkv.ledger.records import Move
from megatron_distkv.ledger.redis_loans import RedisLoans
from megatron_distkv.ledger.redis_members import RedisMembers
from megatron_distkv.ledger.redis_records import pairs, read_loan, read_placements, read_record
from megatron_distkv.ledger.redis_scripts import reading, to_ms
from megatron_distkv.rblock import InstanceId


class RedisLedger(RedisMembers, RedisLoans):
    """Members, their loans, and here the pool as a whole. Thread-safe."""

    @reading
    def snapshot(self) -> PoolSnapshot:
        generation, now, instances, loans = self._run("snapshot")
        return PoolSnapshot(
            generation,
            int(now),
            tuple(
                read_record(name, float(end_ms) - int(now), dict(pairs(fields)))
                for name, end_ms, fields, _ in instances
            ),
            tuple(read_loan(row) for row in loans),
            {InstanceId(name): read_placements(flat) for name, _, _, flat in instances if flat},
        )

    @reading
    def lead(self, candidate: str, lease_s: float) -> bool:
        return bool(self._run("lead", candidate, to_ms(lease_s)))

    @reading
    def publish_moves(self, leader: str, moves: Sequence[Move]) -> bool:
        flat = [
            part for move in moves for part in (move.source, f"{move.request_id}|{move.destination}|{move.num_rblocks}")
        ]
        return bool(self._run("publish_moves", leader, *flat))

    @reading
    def events(self, count: int) -> list[dict[str, str]]:
        rows: Any = self._redis.xrevrange(f"{self._prefix}:events", count=count)
        return [{"at_ms": entry.partition("-")[0], **fields} for entry, fields in reversed(rows)]
