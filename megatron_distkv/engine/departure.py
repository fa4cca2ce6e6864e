"""How an instance leaves its pool: it takes nothing new, gives back what it lends, and hands over what runs."""

import time
from collections.abc import Mapping

from megatron_distkv.engine.admission import Admission
from megatron_distkv.engine.handover import Handover
from megatron_distkv.engine.lender import Lender
from megatron_distkv.engine.reporting import Reporting
from megatron_distkv.engine.scheduler import Scheduler
from megatron_distkv.kvcache.rblock_allocator import RBlockAllocator
from megatron_distkv.messages import HandedOver
from megatron_distkv.pool import InstanceState, Loans
from megatron_distkv.rmanager import Adoptions, Lending, Move, RManager


class Departure:
    """Nothing until `begin`; then a part of every step until `is_over`. The engine's thread calls it."""

    def __init__(
        self,
        admission: Admission,
        reporting: Reporting,
        lending: Lending,
        rmanager: RManager,
        allocator: RBlockAllocator,
        scheduler: Scheduler,
        loans: Loans,
        adoptions: Adoptions,
        handover: Handover,
    ) -> None:
        self._admission = admission
        self._reporting = reporting
        self._lending = lending
        self._rmanager = rmanager
        self._allocator = allocator
        self._scheduler = scheduler
        self._loans = loans
        self._adoptions = adoptions
        self._handover = handover
        self._ends_by_s: float | None = None
        self.host_lender: Lender | None = None
        """Of this instance's own; it leaves with it."""

    @property
    def is_under_way(self) -> bool:
        return self._ends_by_s is not None

    @property
    def is_over(self) -> bool:
        """Nothing runs, is lent, or waits for its heir; or the time for that is over: gateways go on elsewhere."""
        if self._ends_by_s is None:
            return False
        num_lent = self._allocator.num_lent + (self.host_lender.allocator.num_lent if self.host_lender else 0)
        is_empty = self._scheduler.is_idle and num_lent == 0 and not self._loans.has_transfers
        return is_empty or time.monotonic() > self._ends_by_s

    def begin(self, within_s: float) -> None:
        self._ends_by_s = time.monotonic() + within_s
        self._admission.draining = True
        self._lending.draining = True
        self._adoptions.draining = True
        self._reporting.state = InstanceState.DRAINING
        self._reporting.update()

    def begin_step(self) -> None:
        """Ask for what is still lent, and choose what goes next."""
        if self.is_under_way:
            self._rmanager.ask_back_all()
            if self.host_lender is not None:
                self.host_lender.ask_back()
            self._loans.settle_transfers()
            self._handover.begin_step()

    def plan(self) -> list[Move]:
        """What this step copies to a successor."""
        return self._handover.plan() if self.is_under_way else []

    def end_step(self, lost: Mapping[str, str]) -> None:
        """These instances were lost in this step."""
        if self.is_under_way:
            self._handover.end_step(lost)

    def take_farewells(self) -> list[HandedOver]:
        """What gateways are to be told of requests that go on elsewhere."""
        return self._handover.take_farewells()
