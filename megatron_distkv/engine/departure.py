"""How an instance leaves its pool: it takes nothing new, gives back what it lends, and ends what runs."""

import time

from megatron_distkv.engine.admission import Admission
from megatron_distkv.engine.reporting import Reporting
from megatron_distkv.engine.scheduler import Scheduler
from megatron_distkv.kvcache.rblock_allocator import RBlockAllocator
from megatron_distkv.ledger import InstanceState
from megatron_distkv.rmanager import Lending, RManager


class Departure:
    """Nothing until `begin`; then `go_on` with every step until `is_over`. The engine's thread calls it."""

    def __init__(
        self,
        admission: Admission,
        reporting: Reporting,
        lending: Lending,
        rmanager: RManager,
        allocator: RBlockAllocator,
        scheduler: Scheduler,
    ) -> None:
        self._admission = admission
        self._reporting = reporting
        self._lending = lending
        self._rmanager = rmanager
        self._allocator = allocator
        self._scheduler = scheduler
        self._ends_by_s: float | None = None

    @property
    def is_under_way(self) -> bool:
        return self._ends_by_s is not None

    @property
    def is_over(self) -> bool:
        """Nothing runs and nothing is lent, or the time for that is over: gateways go on elsewhere."""
        if self._ends_by_s is None:
            return False
        is_empty = self._scheduler.is_idle and self._allocator.num_lent == 0
        return is_empty or time.monotonic() > self._ends_by_s

    def begin(self, within_s: float) -> None:
        self._ends_by_s = time.monotonic() + within_s
        self._admission.draining = True
        self._lending.draining = True
        self._reporting.state = InstanceState.DRAINING
        self._reporting.update()

    def go_on(self) -> None:
        """Ask for what is still lent."""
        if self.is_under_way:
            self._rmanager.reclaim_all()
