"""How an instance leaves its pool: it takes nothing new, gives back what it lends, and hands over what runs."""

from collections.abc import Callable, Mapping
from typing import Protocol

from megatron_distkv.clock import Clock
from megatron_distkv.handover.sender import Sender
from megatron_distkv.messages import HandedOver
from megatron_distkv.pool import Loans
from megatron_distkv.rmanager import Move, RManager


class HostLender(Protocol):
    """The memory-only lender of this instance's own: it leaves with it (engine.Lender)."""

    @property
    def num_lent(self) -> int: ...
    def ask_back(self) -> None:
        """Lend nothing new, and recall all that is still lent."""


class Drain:
    """Nothing until `begin`; then a part of every step until `is_over`. The engine's thread calls it.

    `is_empty`: nothing runs, is lent or comes in here. `announce`: nothing new is taken any more while True.
    """

    def __init__(
        self,
        sender: Sender,
        rmanager: RManager,
        loans: Loans,
        is_empty: Callable[[], bool],
        announce: Callable[[bool], None],
        clock: Clock,
    ) -> None:
        self._sender = sender
        self._rmanager = rmanager
        self._loans = loans
        self._is_empty = is_empty
        self._announce = announce
        self._clock = clock
        self._ends_by_s: float | None = None
        self.host_lender: HostLender | None = None

    @property
    def is_under_way(self) -> bool:
        return self._ends_by_s is not None

    @property
    def is_over(self) -> bool:
        """Nothing is left, nor waits for its new debtor; or the time for that is over: gateways go on elsewhere."""
        if self._ends_by_s is None:
            return False
        num_lent = self.host_lender.num_lent if self.host_lender is not None else 0
        is_empty = self._is_empty() and num_lent == 0 and not self._loans.has_transfers
        return is_empty or self._clock.monotonic_s() > self._ends_by_s

    def begin(self, within_s: float) -> None:
        self._ends_by_s = self._clock.monotonic_s() + within_s
        self._announce(True)

    def cancel(self) -> None:
        """This instance stays after all, with what it has not handed over yet."""
        self._ends_by_s = None
        self._sender.give_up()
        self._announce(False)

    def begin_step(self) -> None:
        """Ask for what is still lent, and choose what goes next."""
        self._loans.settle_transfers()
        if self.is_under_way:
            self._rmanager.ask_back_all()
            if self.host_lender is not None:
                self.host_lender.ask_back()
            self._sender.begin_step()

    def plan(self) -> list[Move]:
        """What this step copies to a successor."""
        return self._sender.plan() if self.is_under_way else []

    def end_step(self, lost: Mapping[str, str]) -> None:
        """These members were lost in this step."""
        if self.is_under_way:
            self._sender.end_step(lost)

    def take_final_notices(self) -> list[HandedOver]:
        """What gateways are to be told of requests that go on elsewhere."""
        return self._sender.take_final_notices()
