"""The debt ledger in Redis or Valkey (>= 6.2). One Lua script per operation, so each is atomic on the server."""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from megatron_distkv.errors import LedgerUnavailable, SupersededError
from megatron_distkv.ledger.keys import prefix
from megatron_distkv.ledger.pool_snapshot import PoolSnapshot
from megatron_distkv.ledger.records import (
    Creditor,
    HeartbeatReply,
    InstanceReport,
    Loan,
    Move,
    Recall,
    Registration,
)
from megatron_distkv.ledger.redis_records import pairs, read_loan, read_move, read_placements, read_record
from megatron_distkv.ledger.url import explain, warning_about
from megatron_distkv.log import get_logger
from megatron_distkv.messages import Refusal
from megatron_distkv.rblock import InstanceId, LoanId

logger = get_logger(__name__)
_SCRIPTS = Path(__file__).parent / "scripts"
_OPERATIONS = (
    "register", "heartbeat", "recommend", "borrow", "accept", "release", "reclaim", "restore", "transfer", "loans_of",
    "expire", "deregister", "describe", "snapshot", "lead", "publish_moves",
)  # fmt: skip
_P = ParamSpec("_P")
_T = TypeVar("_T")


def _reading(operation: Callable[_P, _T]) -> Callable[_P, _T]:
    """A server that is away, and one whose data somebody else has spoilt, are the same to who asks: no answer."""

    @functools.wraps(operation)
    def guarded(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        try:
            return operation(*args, **kwargs)
        except redis.RedisError as error:
            raise LedgerUnavailable(f"{operation.__name__}: {error}") from error
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError) as error:
            raise LedgerUnavailable(f"{operation.__name__}: the ledger's data cannot be read: {error}") from error

    return guarded


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

    @_reading
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

    @_reading
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
            recalls=tuple(Recall(LoanId(loan), instance, int(num)) for loan, num in pairs(recalls)),
            moves=tuple(read_move(instance, text) for text in moves),
        )

    @_reading
    def describe(self, instance: InstanceId, epoch: int, info: Mapping[str, str]) -> bool:
        return bool(self._run("describe", instance, epoch, json.dumps(dict(info))))

    @_reading
    def deregister(self, instance: InstanceId, epoch: int) -> None:
        self._run("deregister", instance, epoch)

    @_reading
    def expire(self, limit: int = 64) -> list[InstanceId]:
        return [InstanceId(name) for name in self._run("expire", limit)]

    # ------------------------------------------------------------------ loans

    @_reading
    def recommend(self, debtor: InstanceId, num_rblocks: int, limit: int) -> list[Creditor]:
        rows = self._run("recommend", debtor, num_rblocks, limit)
        return [Creditor(InstanceId(name), int(epoch), address, int(free)) for name, epoch, address, free in rows]

    @_reading
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

    @_reading
    def accept(self, loan_id: LoanId, creditor: InstanceId, creditor_epoch: int) -> Refusal | None:
        return _refusal(self._run("accept", loan_id, creditor, creditor_epoch))

    @_reading
    def release(self, loan_id: LoanId, instance: InstanceId, epoch: int) -> int:
        return int(self._run("release", loan_id, instance, epoch))

    @_reading
    def reclaim(self, creditor: InstanceId, epoch: int, num_rblocks: int) -> list[Recall]:
        rows = self._run("reclaim", creditor, epoch, num_rblocks)
        return [Recall(LoanId(loan), InstanceId(debtor), int(num)) for loan, debtor, num in rows]

    @_reading
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

    @_reading
    def transfer(
        self,
        loan_id: LoanId,
        new_loan_id: LoanId,
        heir: InstanceId,
        heir_epoch: int,
        creditor: InstanceId,
        creditor_epoch: int,
    ) -> Refusal | None:
        return _refusal(
            self._run("transfer", loan_id, new_loan_id, heir, heir_epoch, creditor, creditor_epoch)
        )  # fmt: skip

    @_reading
    def loans_of(self, creditor: InstanceId, epoch: int) -> list[Loan]:
        rows = self._run("loans_of", creditor, epoch)
        if rows is None:
            raise LedgerUnavailable(f"the ledger does not know {creditor} (epoch {epoch}) now")
        return [read_loan(row) for row in rows]

    # ------------------------------------------------------------------ the pool

    @_reading
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

    @_reading
    def lead(self, candidate: str, lease_s: float) -> bool:
        return bool(self._run("lead", candidate, _ms(lease_s)))

    @_reading
    def publish_moves(self, leader: str, moves: Sequence[Move]) -> bool:
        flat = [
            part for move in moves for part in (move.source, f"{move.request_id}|{move.destination}|{move.num_rblocks}")
        ]
        return bool(self._run("publish_moves", leader, *flat))

    @_reading
    def events(self, count: int) -> list[dict[str, str]]:
        rows: Any = self._redis.xrevrange(f"{self._prefix}:events", count=count)
        return [{"at_ms": entry.partition("-")[0], **fields} for entry, fields in reversed(rows)]

    def close(self) -> None:
        self._redis.close()

    # ------------------------------------------------------------------ inside

    def _run(self, operation: str, *arguments: object) -> Any:
        now = str(self._clock_ms()) if self._clock_ms else ""
        return self._scripts[operation](keys=[self._prefix], args=[now, *map(str, arguments)])


def _ms(seconds: float) -> int:
    return int(seconds * 1000)


def _refusal(name: str) -> Refusal | None:
    return Refusal(name) if name else None
