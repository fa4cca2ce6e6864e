"""The debt ledger in Redis or Valkey (>= 6.2): one Lua script per operation, so each is atomic there.

Contract: DebtLedger. The key schema is in keys.py, the rules are in scripts/; redis_records.py reads and
writes what goes in and comes out.
"""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from megatron_distkv.errors import LedgerUnavailable, SupersededError
from megatron_distkv.ledger.keys import prefix
from megatron_distkv.ledger.pool_snapshot import PoolChanges, PoolReader, PoolSnapshot, ReadPosition
from megatron_distkv.ledger.records import (
    CreditorOffer,
    HeartbeatReply,
    InstanceReport,
    Loan,
    MoveOrder,
    Recall,
    Registration,
    heartbeat_interval_s,
)
from megatron_distkv.ledger.redis_records import (
    UNREADABLE,
    counted_text,
    info_text,
    placements_text,
    read_creditor,
    read_loan,
    read_member,
    read_moves,
    read_pairs,
    read_refusal,
)
from megatron_distkv.ledger.url import explain, warning_about
from megatron_distkv.log import get_logger
from megatron_distkv.messages import Refusal
from megatron_distkv.rblock import InstanceId, LoanKey

logger = get_logger(__name__)
_SCRIPTS = Path(__file__).parent / "scripts"
_COMMON, _ADOPT_SERVER = "_common", "adopt_server"
# Loans asked for at once: a call stays short.
_LOANS_PER_CALL = 500
_P = ParamSpec("_P")
_T = TypeVar("_T")


def reading(operation: Callable[_P, _T]) -> Callable[_P, _T]:
    """A server that is away, and one whose answers have another shape than ours, are the same to who asks."""

    @functools.wraps(operation)
    def guarded(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        try:
            return operation(*args, **kwargs)
        except redis.RedisError as error:
            raise LedgerUnavailable(f"{operation.__name__}: {error}") from error
        except UNREADABLE as error:
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
        texts = {path.stem: path.read_text() for path in _SCRIPTS.glob("*.lua")}
        common = texts.pop(_COMMON)
        self._adopt_server = common + texts.pop(_ADOPT_SERVER)
        try:
            self._redis = redis.Redis.from_url(
                url,
                decode_responses=True,
                encoding_errors="replace",  # a text that is none spoils its own record, not the whole answer
                socket_timeout=timeout_s,
                socket_connect_timeout=timeout_s,
                retry=Retry(NoBackoff(), 0),
                # A new connection to a server far away should cost no more words than it must
                protocol=2,
                lib_name=None,
                lib_version=None,
                redis_connect_func=self._greet,
            )
        except ValueError as error:
            raise explain(url, error) from None
        self._scripts = {name: self._redis.register_script(common + text) for name, text in texts.items()}

    def ping_or_explain(self) -> None:
        """Raises UserError, one sentence, when the server cannot be used."""
        try:
            self._redis.ping()
        except (redis.RedisError, TypeError, ValueError, OSError) as error:  # TypeError: an option that nobody knows
            raise explain(self._url, error) from None
        warning = warning_about(self._url)
        if warning is not None:
            logger.warning("%s", warning)

    def close(self) -> None:
        self._redis.close()

    # Members

    @reading
    def register(
        self, instance: InstanceId, address: str, total_rblocks: int, reserved_rblocks: int, lease_s: float, *,
        epoch: int = 0, generation: str = "", info: Mapping[str, str] | None = None,
    ) -> Registration:  # fmt: skip
        first, second = self._run(
            "register", instance, address, total_rblocks, reserved_rblocks, to_ms(lease_s), epoch, generation,
            info_text(info),
        )  # fmt: skip
        if first == "superseded":
            raise SupersededError(f"a newer {instance} has registered (epoch {second}, this is {epoch})")
        return Registration(int(first), second)

    @reading
    def heartbeat(self, instance: InstanceId, epoch: int, report: InstanceReport, lease_s: float) -> HeartbeatReply:
        reply = self._run(
            "heartbeat", instance, epoch, to_ms(lease_s), report.local_used_rblocks, report.state.value,
            report.num_running, report.num_waiting, report.max_request_tokens, report.prefill_tokens_left,
            placements_text(report.placements), counted_text(report.counted),
        )  # fmt: skip
        if int(reply[0]) == 0:
            return HeartbeatReply(known=False)
        generation, *counts, recalls, moves = reply[1:]
        lent, borrowed, free, lendable_now, lending_caps, num_members = map(int, counts)
        return HeartbeatReply(
            known=True,
            generation=generation,
            lent=lent,
            borrowed=borrowed,
            free=free,
            lendable_now=lendable_now,
            lending_caps=lending_caps,
            num_members=num_members,
            interval_s=heartbeat_interval_s(num_members),
            recalls=tuple(Recall(LoanKey(loan), instance, int(num)) for loan, num in read_pairs(recalls)),
            moves=tuple(read_moves(instance, moves.splitlines())),
        )

    @reading
    def describe(self, instance: InstanceId, epoch: int, info: Mapping[str, str]) -> bool:
        return bool(self._run("describe", instance, epoch, info_text(info)))

    @reading
    def deregister(self, instance: InstanceId, epoch: int) -> None:
        self._run("deregister", instance, epoch)

    @reading
    def expire(self, limit: int = 64) -> list[InstanceId]:
        return [InstanceId(name) for name in self._run("expire", limit)]

    # Loans

    @reading
    def recommend(self, debtor: InstanceId, limit: int, skip: int = 0) -> list[CreditorOffer]:
        return [read_creditor(row) for row in self._run("recommend", debtor, limit, skip)]

    @reading
    def borrow(
        self, loan_id: LoanKey, debtor: InstanceId, debtor_epoch: int, creditor: InstanceId, creditor_epoch: int,
        num_rblocks: int, pending_s: float,
    ) -> Refusal | None:  # fmt: skip
        terms = (loan_id, debtor, debtor_epoch, creditor, creditor_epoch, num_rblocks)
        return read_refusal(self._run("borrow", *terms, to_ms(pending_s)))

    @reading
    def accept(self, loan_id: LoanKey, creditor: InstanceId, creditor_epoch: int) -> Refusal | None:
        return read_refusal(self._run("accept", loan_id, creditor, creditor_epoch))

    @reading
    def release(self, loan_id: LoanKey, instance: InstanceId, epoch: int) -> int:
        return int(self._run("release", loan_id, instance, epoch))

    @reading
    def reclaim(self, creditor: InstanceId, epoch: int, num_rblocks: int) -> list[Recall]:
        rows = self._run("reclaim", creditor, epoch, num_rblocks)
        return [Recall(LoanKey(loan), InstanceId(debtor), int(num)) for loan, debtor, num in rows]

    @reading
    def restore(
        self, loan_id: LoanKey, debtor: InstanceId, debtor_epoch: int, creditor: InstanceId, creditor_epoch: int,
        num_rblocks: int,
    ) -> Refusal | None:  # fmt: skip
        return read_refusal(
            self._run("restore", loan_id, debtor, debtor_epoch, creditor, creditor_epoch, num_rblocks)
        )  # fmt: skip

    @reading
    def transfer(
        self, loan_id: LoanKey, new_loan_id: LoanKey, new_debtor: InstanceId, new_debtor_epoch: int,
        creditor: InstanceId, creditor_epoch: int,
    ) -> Refusal | None:  # fmt: skip
        return read_refusal(
            self._run("transfer", loan_id, new_loan_id, new_debtor, new_debtor_epoch, creditor, creditor_epoch)
        )  # fmt: skip

    @reading
    def loans_of(self, creditor: InstanceId, epoch: int) -> list[Loan]:
        rows = self._run("loans_of", creditor, epoch)
        if rows is None:
            raise LedgerUnavailable(f"the ledger does not know {creditor} (epoch {epoch}) now")
        return [read_loan(row) for row in rows]

    @reading
    def known_loans(self, loan_ids: Collection[LoanKey]) -> set[LoanKey]:
        asked = list(loan_ids)
        parts = (asked[first : first + _LOANS_PER_CALL] for first in range(0, len(asked), _LOANS_PER_CALL))
        return {LoanKey(loan) for part in parts for loan in self._run("known_loans", *part)}

    # The pool

    @reading
    def changes(
        self, since: int, limit: int = 256, *, with_loans: bool = True, with_placements: bool = True
    ) -> PoolChanges:
        began_at, version = ReadPosition.unpack(since)
        generation, now, is_whole, began_at, version, has_more, rows = self._run(
            "changes", began_at, version, limit, int(with_loans), int(with_placements)
        )
        return PoolChanges(
            generation,
            ReadPosition.pack(int(began_at), int(version)),
            int(now),
            bool(is_whole),
            bool(has_more),
            tuple(read_member(row, int(now)) for row in rows),
        )

    def snapshot(self) -> PoolSnapshot:
        return PoolReader(self.changes).snapshot()

    @reading
    def lead(self, candidate: str, lease_s: float) -> bool:
        return bool(self._run("lead", candidate, to_ms(lease_s)))

    @reading
    def publish_moves(self, leader: str, moves: Sequence[MoveOrder]) -> bool:
        flat = [
            part for move in moves for part in (move.source, f"{move.request_id}|{move.destination}|{move.num_rblocks}")
        ]
        return bool(self._run("publish_moves", leader, *flat))

    @reading
    def events(self, count: int) -> list[dict[str, str]]:
        rows: Any = self._redis.xrevrange(f"{self._prefix}:events", count=count)
        return [{"at_ms": entry.partition("-")[0], **fields} for entry, fields in reversed(rows)]

    def _greet(self, connection: Any) -> None:
        """Each new connection may lead to another life of the server, and none outlives the one that it leads to."""
        connection.on_connect()
        connection.send_command("EVAL", self._adopt_server, 1, self._prefix, self._injected_time())
        connection.read_response()

    def _run(self, operation: str, *arguments: object) -> Any:
        try:
            return self._scripts[operation](keys=[self._prefix], args=[self._injected_time(), *map(str, arguments)])
        except redis.ReadOnlyError:  # a replica now: when it writes again, it may have another server's data
            self._redis.connection_pool.disconnect()
            raise

    def _injected_time(self) -> str:
        return str(self._clock_ms()) if self._clock_ms else ""


def to_ms(seconds: float) -> int:
    return int(seconds * 1000)
