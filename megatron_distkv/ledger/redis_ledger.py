"""The debt ledger in Redis or Valkey (>= 6.2). One Lua script per operation, so each is atomic on the server."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from megatron_distkv.errors import LedgerUnavailable, SupersededError
from megatron_distkv.ledger.keys import prefix
from megatron_distkv.ledger.pool_snapshot import PoolSnapshot
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
)
from megatron_distkv.ledger.url import explain, warning_about
from megatron_distkv.log import get_logger
from megatron_distkv.messages import Refusal
from megatron_distkv.rblock import InstanceId, LoanId

logger = get_logger(__name__)
_SCRIPTS = Path(__file__).parent / "scripts"
_OPERATIONS = (
    "register", "heartbeat", "recommend", "borrow", "accept", "release", "reclaim", "restore", "loans_of", "expire",
    "deregister", "snapshot", "lead", "publish_moves",
)  # fmt: skip


class RedisLedger:
    """Thread-safe. A server silent for `timeout_s` raises LedgerUnavailable: nothing is retried here."""

    def __init__(
        self, url: str, pool: str, *, timeout_s: float = 1.0, clock_ms: Callable[[], int] | None = None
    ) -> None:
        self._url = url
        self._prefix = prefix(pool)
        self._clock_ms = clock_ms  # tests only: time given to the scripts instead of the server's own
        try:
            self._redis = redis.Redis.from_url(
                url,
                decode_responses=True,
                socket_timeout=timeout_s,
                socket_connect_timeout=timeout_s,
                retry=Retry(NoBackoff(), 0),
            )
        except ValueError as error:
            raise explain(url, error) from None
        common = (_SCRIPTS / "_common.lua").read_text()
        self._scripts = {
            name: self._redis.register_script(common + (_SCRIPTS / f"{name}.lua").read_text()) for name in _OPERATIONS
        }

    def ping_or_explain(self) -> None:
        """Raises UserError, one sentence, when the server cannot be used."""
        try:
            self._redis.ping()
        except (redis.RedisError, TypeError, ValueError, OSError) as error:  # TypeError: an option that nobody knows
            raise explain(self._url, error) from None
        warning = warning_about(self._url)
        if warning is not None:
            logger.warning("%s", warning)

    # ------------------------------------------------------------------ lives

    def register(
        self,
        instance: InstanceId,
        address: str,
        total_rblocks: int,
        reserved_rblocks: int,
        lease_s: float,
        *,
        epoch: int = 0,
        generation: str = "",
        info: Mapping[str, str] | None = None,
    ) -> Registration:
        facts = json.dumps(dict(info or {}))
        first, second = self._run(
            "register", instance, address, total_rblocks, reserved_rblocks, _ms(lease_s), epoch, generation, facts
        )
        if first == "superseded":
            raise SupersededError(f"a newer {instance} has registered (epoch {second}, this is {epoch})")
        return Registration(int(first), second)

    def heartbeat(self, instance: InstanceId, epoch: int, report: InstanceReport, lease_s: float) -> HeartbeatReply:
        placements = [
            part
            for entry in report.placements
            for part in (f"{entry.request_id}|{entry.holder}", entry.num_rblocks, int(entry.is_local))
        ]
        reply = self._run(
            "heartbeat", instance, epoch, _ms(lease_s), report.local_used_rblocks, report.state.value,
            report.num_running, report.num_waiting, report.max_request_tokens, *placements,
        )  # fmt: skip
        if int(reply[0]) == 0:
            return HeartbeatReply(known=False)
        _, generation, lent, borrowed, free, recalls, moves = reply
        return HeartbeatReply(
            known=True,
            generation=generation,
            lent=int(lent),
            borrowed=int(borrowed),
            free=int(free),
            recalls=tuple(Recall(LoanId(loan), instance, int(num)) for loan, num in _pairs(recalls)),
            moves=tuple(_move(instance, text) for text in moves),
        )

    def deregister(self, instance: InstanceId, epoch: int) -> None:
        self._run("deregister", instance, epoch)

    def expire(self, limit: int = 64) -> list[InstanceId]:
        return [InstanceId(name) for name in self._run("expire", limit)]

    # ------------------------------------------------------------------ loans

    def recommend(self, debtor: InstanceId, num_rblocks: int, limit: int) -> list[Creditor]:
        rows = self._run("recommend", debtor, num_rblocks, limit)
        return [Creditor(InstanceId(name), int(epoch), address, int(free)) for name, epoch, address, free in rows]

    def borrow(
        self,
        loan_id: LoanId,
        debtor: InstanceId,
        debtor_epoch: int,
        creditor: InstanceId,
        creditor_epoch: int,
        num_rblocks: int,
        pending_s: float,
    ) -> Refusal | None:
        return _refusal(
            self._run(
                "borrow", loan_id, debtor, debtor_epoch, creditor, creditor_epoch, num_rblocks, _ms(pending_s)
            )
        )  # fmt: skip

    def accept(self, loan_id: LoanId, creditor: InstanceId, creditor_epoch: int) -> Refusal | None:
        return _refusal(self._run("accept", loan_id, creditor, creditor_epoch))

    def release(self, loan_id: LoanId, instance: InstanceId, epoch: int) -> int:
        return int(self._run("release", loan_id, instance, epoch))

    def reclaim(self, creditor: InstanceId, epoch: int, num_rblocks: int) -> list[Recall]:
        rows = self._run("reclaim", creditor, epoch, num_rblocks)
        return [Recall(LoanId(loan), InstanceId(debtor), int(num)) for loan, debtor, num in rows]

    def restore(
        self,
        loan_id: LoanId,
        debtor: InstanceId,
        debtor_epoch: int,
        creditor: InstanceId,
        creditor_epoch: int,
        num_rblocks: int,
    ) -> Refusal | None:
        return _refusal(
            self._run("restore", loan_id, debtor, debtor_epoch, creditor, creditor_epoch, num_rblocks)
        )  # fmt: skip

    def loans_of(self, creditor: InstanceId) -> list[Loan]:
        return [_loan(row) for row in self._run("loans_of", creditor)]

    # ------------------------------------------------------------------ the pool

    def snapshot(self) -> PoolSnapshot:
        generation, now, instances, loans = self._run("snapshot")
        return PoolSnapshot(
            generation,
            int(now),
            tuple(
                _record(name, float(end_ms) - int(now), dict(_pairs(fields))) for name, end_ms, fields, _ in instances
            ),
            tuple(_loan(row) for row in loans),
            {InstanceId(name): _placements(flat) for name, _, _, flat in instances if flat},
        )

    def lead(self, candidate: str, lease_s: float) -> bool:
        return bool(self._run("lead", candidate, _ms(lease_s)))

    def publish_moves(self, leader: str, moves: Sequence[Move]) -> bool:
        flat = [
            part for move in moves for part in (move.source, f"{move.request_id}|{move.destination}|{move.num_rblocks}")
        ]
        return bool(self._run("publish_moves", leader, *flat))

    def events(self, count: int) -> list[dict[str, str]]:
        try:
            rows: Any = self._redis.xrevrange(f"{self._prefix}:events", count=count)
        except redis.RedisError as error:
            raise LedgerUnavailable(str(error)) from error
        return [fields for _, fields in reversed(rows)]

    def close(self) -> None:
        self._redis.close()

    # ------------------------------------------------------------------ inside

    def _run(self, operation: str, *arguments: object) -> Any:
        now = str(self._clock_ms()) if self._clock_ms else ""
        try:
            return self._scripts[operation](keys=[self._prefix], args=[now, *map(str, arguments)])
        except redis.RedisError as error:
            raise LedgerUnavailable(f"{operation}: {error}") from error


def _ms(seconds: float) -> int:
    return int(seconds * 1000)


def _refusal(name: str) -> Refusal | None:
    return Refusal(name) if name else None


def _pairs(flat: Sequence[str]) -> list[tuple[str, str]]:
    return list(zip(flat[::2], flat[1::2], strict=True))


def _move(source: InstanceId, text: str) -> Move:
    request_id, destination, num = text.rsplit("|", 2)
    return Move(request_id, source, InstanceId(destination), int(num))


def _loan(row: Sequence[str]) -> Loan:
    loan, debtor, debtor_epoch, creditor, creditor_epoch, num, state = row
    return Loan(
        LoanId(loan), InstanceId(debtor), int(debtor_epoch), InstanceId(creditor), int(creditor_epoch), int(num),
        LoanState(state),
    )  # fmt: skip


def _record(name: str, lease_left_ms: float, fields: Mapping[str, str]) -> InstanceRecord:
    counts = {
        key: int(fields[key])
        for key in ("epoch", "total", "reserved", "local_used", "lent", "borrowed", "num_running", "num_waiting",
                    "max_request_tokens")
    }  # fmt: skip
    return InstanceRecord(
        instance=InstanceId(name),
        address=fields["address"],
        state=InstanceState(fields["state"]),
        lease_left_ms=int(lease_left_ms),
        info=json.loads(fields["info"]),
        **counts,
    )


def _placements(flat: Sequence[str]) -> tuple[RequestPlacementEntry, ...]:
    entries = []
    for key, value in sorted(_pairs(flat)):
        request_id, _, holder = key.rpartition("|")
        num, _, is_local = value.partition("|")
        entries.append(RequestPlacementEntry(request_id, InstanceId(holder), int(num), is_local == "1"))
    return tuple(sorted(entries, key=lambda entry: (entry.request_id, entry.holder)))
