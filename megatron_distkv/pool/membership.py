"""Membership of a pool, for instances and lenders alike: join, report with every heartbeat, leave."""

import queue
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import msgspec

from megatron_distkv.clock import Clock
from megatron_distkv.config.instance import LedgerConfig
from megatron_distkv.errors import LedgerUnavailable, UserError
from megatron_distkv.ledger import (
    DebtLedger,
    HeartbeatReply,
    InstanceRecord,
    InstanceReport,
    MoveOrder,
    PoolReader,
    Recall,
)
from megatron_distkv.log import get_logger
from megatron_distkv.pool.links import LinkCost
from megatron_distkv.pool.member import Identity, MemberInfo, MemberUnreadable, read_info, write_info

logger = get_logger(__name__)
# Of who joins, with a ledger that was there a moment ago: it may be restarted, or its machine busy.
JOIN_PATIENCE_S = 10.0
_RETRY_AFTER_S = 0.2
# A lease outlasts so many heartbeats at least.
BEATS_PER_LEASE = 4
# Heartbeats that are wished for sooner come this far apart at least.
MIN_INTERVAL_S = 0.2


@dataclass(frozen=True)
class PoolTotals:
    """rBlocks that all others would lend now, and may lend at most; what the last heartbeat brought."""

    lendable_now: int = 0
    lending_caps: int = 0


class Membership:
    """`beat` is for a thread of its own; `orders` collects recalls and planned moves for the engine's.

    `address`: where other members reach it. `total`, `reserved`: rBlocks of its pool, and those never lent.
    `follow_ups`: what else goes with every heartbeat that the ledger answered, given the rBlocks that this member lends
    by that answer; each may raise LedgerUnavailable.
    `when_forgotten`: the ledger has lost its data, and this member has registered again.
    """

    def __init__(
        self,
        ledger: DebtLedger,
        identity: Identity,
        config: LedgerConfig,
        address: str,
        total: int,
        reserved: int,
        info: MemberInfo,
        clock: Clock,
    ) -> None:
        """Raises UserError in a pool of another shape or checkpoint, or whose ledger stays silent."""
        self._ledger = ledger
        self.identity = identity
        self._config = config
        self._address = address
        self._total, self._reserved = total, reserved
        self.info = info
        self._clock = clock
        self._ledger_is_away = False
        self._reported: InstanceReport | None = None  # the last one that the ledger answered
        self._interval_s = config.heartbeat_interval_s
        self._last_beat_s = float("-inf")
        self.round_trip_s = 0.0
        """Of the last heartbeat: how far away the ledger is."""
        self.totals = PoolTotals()
        self.orders: queue.SimpleQueue[Recall | MoveOrder] = queue.SimpleQueue()
        self.report: Callable[[], InstanceReport] = lambda: InstanceReport(0)
        self.follow_ups: Sequence[Callable[[int], None]] = ()
        self.when_forgotten: Callable[[float], None] = lambda lease_s: None
        self._patiently(self._require_same_model)

    # ------------------------------------------------------------------ join and leave

    def join(self) -> None:
        """Two members may come at the same moment, each before the other is in the ledger: the later one leaves again.

        Raises UserError, SupersededError.
        """
        self._patiently(self._register)
        try:
            self._patiently(lambda: self._require_same_model(before_epoch=self.identity.epoch))
        except UserError:
            with suppress(LedgerUnavailable):
                self.leave()
            raise

    def leave(self) -> None:
        self._ledger.deregister(self.identity.instance, self.identity.epoch)

    def publish_links(self, links: dict[str, LinkCost]) -> None:
        """Raises LedgerUnavailable. Any thread may call it."""
        self.info = msgspec.structs.replace(self.info, links=links)
        self._ledger.describe(self.identity.instance, self.identity.epoch, write_info(self.info))

    def _patiently(self, ask: Callable[[], None]) -> None:
        until_s = self._clock.monotonic_s() + JOIN_PATIENCE_S
        while True:
            try:
                ask()
                return
            except LedgerUnavailable as error:
                if self._clock.monotonic_s() > until_s:
                    raise UserError(
                        f"{self.identity.instance} cannot join pool {self._config.pool!r}: {error}"
                    ) from error
                self._clock.sleep(_RETRY_AFTER_S)

    def _register(self) -> None:
        identity = self.identity
        registration = self._ledger.register(
            identity.instance,
            self._address,
            self._total,
            self._reserved,
            self._lease_s,
            epoch=identity.epoch,
            generation=identity.generation,
            info=write_info(self.info),
        )
        identity.epoch, identity.generation = registration.epoch, registration.generation

    def _require_same_model(self, before_epoch: int | None = None) -> None:
        """As that of all members, or of those that came before this epoch."""
        reader = PoolReader(lambda since: self._ledger.changes(since, with_loans=False, with_placements=False))
        for record in reader.snapshot().live:
            if record.instance != self.identity.instance and (before_epoch is None or record.epoch < before_epoch):
                self._require_same_model_as(record)

    def _require_same_model_as(self, record: InstanceRecord) -> None:
        try:
            theirs = read_info(record.info)
        except MemberUnreadable as error:
            logger.warning("%s is left alone: %s", record.instance, error)
            return
        cannot = f"{self.identity.instance} cannot join pool {self._config.pool!r}"
        if differences := self.info.shape.differences(theirs.shape):
            raise UserError(f"{cannot}: its rBlocks have {'; '.join(differences)} as those of {record.instance}")
        if self.info.checkpoint and theirs.checkpoint and self.info.checkpoint != theirs.checkpoint:
            raise UserError(
                f"{cannot}: the weights in {self.info.model} are not those that {record.instance} serves "
                f"({theirs.model}); all instances of a pool must serve the same checkpoint"
            )

    # ------------------------------------------------------------------ heartbeats

    def interval_s(self) -> float:
        """Until the next heartbeat; the ledger of a large pool asks for longer ones."""
        return self._interval_s

    @property
    def is_recent(self) -> bool:
        """Whether a heartbeat that is wished for now would only repeat the last one."""
        return self._clock.monotonic_s() - self._last_beat_s < MIN_INTERVAL_S

    @property
    def _lease_s(self) -> float:
        return max(self._config.lease_s, BEATS_PER_LEASE * self._interval_s)

    def beat(self) -> None:
        """One heartbeat, and what goes with it. A ledger that is away is said once. Raises SupersededError."""
        try:
            self._beat()
            self._note_ledger(is_away=False)
        except LedgerUnavailable:
            self._note_ledger(is_away=True)

    def _beat(self) -> None:
        report, began_s = self.report(), self._clock.monotonic_s()
        news = self._without_repetition(report)
        reply = self._ledger.heartbeat(self.identity.instance, self.identity.epoch, news, self._lease_s)
        self._last_beat_s = self._clock.monotonic_s()
        self.round_trip_s = self._last_beat_s - began_s
        if reply.known:
            self._reported = report
            self._take(reply)
        else:
            logger.warning("the ledger has forgotten this instance: registering again")
            self._reported = None
            self._register()
            self.when_forgotten(self._lease_s)
        for follow_up in self.follow_ups:
            follow_up(reply.lent)

    def _without_repetition(self, report: InstanceReport) -> InstanceReport:
        """What is long and seldom changes is said once."""
        last = self._reported
        if last is not None and report.placements == last.placements:
            report = replace(report, placements=None)
        if last is not None and report.counted == last.counted:
            report = replace(report, counted=None)
        return report

    def _take(self, reply: HeartbeatReply) -> None:
        self.totals = PoolTotals(reply.lendable_now, reply.lending_caps)
        self._interval_s = max(self._config.heartbeat_interval_s, reply.interval_s)
        for recall in reply.recalls:
            self.orders.put(recall)
        for move in reply.moves:
            self.orders.put(move)

    def _note_ledger(self, *, is_away: bool) -> None:
        if is_away != self._ledger_is_away:
            self._ledger_is_away = is_away
            logger.warning("the ledger is away: no new loans" if is_away else "the ledger is back")
