"""Reports this instance to the ledger, renews its lease, and brings back what the ledger has for it."""

import queue
import threading
from collections.abc import Callable
from dataclasses import replace

from megatron_distkv.config.instance import LedgerConfig
from megatron_distkv.errors import LedgerUnavailable, SupersededError
from megatron_distkv.ledger import DebtLedger, HeartbeatReply, InstanceReport, Move, Recall, RequestPlacementEntry
from megatron_distkv.log import get_logger
from megatron_distkv.rmanager.identity import Identity
from megatron_distkv.rmanager.late_releases import LateReleases
from megatron_distkv.rmanager.lending import Lending

logger = get_logger(__name__)
# A large pool's ledger asks for longer intervals: so many may fail before the lease ends.
LEASE_IN_INTERVALS = 4


class Heartbeat:
    """A thread. `orders` collects recalls and planned moves for the engine's thread; `superseded` says: stop."""

    def __init__(
        self,
        ledger: DebtLedger,
        identity: Identity,
        config: LedgerConfig,
        lending: Lending,
        late_releases: LateReleases,
        register: Callable[[], None],
        report: Callable[[], InstanceReport],
    ) -> None:
        """`report` says everything; placements travel only when they have changed since the last answered report."""
        self._ledger = ledger
        self._identity = identity
        self._config = config
        self._lending = lending
        self._late_releases = late_releases
        self._register = register
        self._report = report
        self._stop = threading.Event()
        self._ledger_is_away = False
        self._told: tuple[RequestPlacementEntry, ...] | None = None
        self._interval_s = self._next_interval_s = config.heartbeat_interval_s
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self.orders: queue.SimpleQueue[Recall | Move] = queue.SimpleQueue()
        self.superseded: SupersededError | None = None

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def beat(self) -> None:
        """One report; registers again where the ledger has lost this epoch. Raises LedgerUnavailable, Superseded."""
        report = self._report()
        placements = None if report.placements == self._told else report.placements
        self._interval_s = self._next_interval_s  # never longer than the lease that was asked for bears
        lease_s = max(self._config.lease_s, LEASE_IN_INTERVALS * self._interval_s)
        reply = self._ledger.heartbeat(
            self._identity.instance, self._identity.epoch, replace(report, placements=placements), lease_s
        )
        if reply.known:
            self._told = report.placements
            self._next_interval_s = max(self._config.heartbeat_interval_s, reply.interval_s)
            self._late_releases.tell()
            self._lending.reconcile()
            self._take_orders(reply)
        else:
            logger.warning("the ledger has forgotten this instance: registering again")
            self._told = None
            self._register()
            self._lending.begin_restore(self._config.lease_s)
            self._lending.reconcile()

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            try:
                self.beat()
                self._note_ledger(is_away=False)
            except LedgerUnavailable:
                self._note_ledger(is_away=True)
            except SupersededError as error:
                self.superseded = error
                return
            except Exception:
                logger.exception("heartbeat failed")

    def _take_orders(self, reply: HeartbeatReply) -> None:
        for recall in reply.recalls:
            self.orders.put(recall)
        for move in reply.moves:
            self.orders.put(move)

    def _note_ledger(self, *, is_away: bool) -> None:
        if is_away != self._ledger_is_away:
            self._ledger_is_away = is_away
            logger.warning("the ledger is away: no new loans" if is_away else "the ledger is back")
