"""The gManager's loop: lead, bury the dead, snapshot, plan, publish. Any number may run; one leads."""

import threading

from megatron_distkv.errors import LedgerUnavailable
from megatron_distkv.gmanager.debt_graph import debt_graph, find_cycle
from megatron_distkv.gmanager.planner import plan
from megatron_distkv.ledger import DebtLedger, PoolReader
from megatron_distkv.log import get_logger
from megatron_distkv.pool import picture_of

logger = get_logger(__name__)
# A leader that misses this many plans loses its lease.
LEASE_IN_INTERVALS = 5


class GManager:
    def __init__(self, ledger: DebtLedger, candidate: str, interval_s: float) -> None:
        self._ledger = ledger
        self._reader = PoolReader(ledger.changes)
        self._candidate = candidate
        self._interval_s = interval_s
        self._ledger_is_away = False

    def run(self, stop: threading.Event) -> None:
        while not stop.wait(self._interval_s):
            try:
                self.plan_once()
                self._note_ledger(is_away=False)
            except LedgerUnavailable:
                self._note_ledger(is_away=True)

    def plan_once(self) -> int:
        """One round; returns how many moves were published (0 where another leads). Raises LedgerUnavailable."""
        if not self._ledger.lead(self._candidate, self._interval_s * LEASE_IN_INTERVALS):
            return 0
        for instance in self._ledger.expire():
            logger.warning("%s is dead: its lease has ended, its debts are void", instance)
        picture = picture_of(self._reader.snapshot())
        cycle = find_cycle(debt_graph(picture.loans))
        if cycle is not None:
            logger.error("instances owe each other in a circle: %s", " -> ".join(cycle))
        moves = plan(picture)
        if moves and self._ledger.publish_moves(self._candidate, moves):
            logger.info("planned %s", moves)
            return len(moves)
        return 0

    def _note_ledger(self, *, is_away: bool) -> None:
        if is_away != self._ledger_is_away:
            self._ledger_is_away = is_away
            logger.warning("the ledger is away: no plans" if is_away else "the ledger is back")
