"""What the pool looks like to a gateway: members that it may ask, and who hears of each look."""

from collections.abc import Callable
from pathlib import Path

from megatron_distkv.clock import Clock
from megatron_distkv.log import get_logger
from megatron_distkv.pool import DebtLedger, Member, Picture, PoolView

logger = get_logger(__name__)
# Looks that are this old mean that nobody looks any more; a ledger that is silent costs a second each time.
STALE_AFTER_S = 10.0


class GatewayView:
    """One thread calls `look`; all else belongs to the gateway's own thread, which calls `tell` after each look."""

    def __init__(self, ledger: DebtLedger, clock: Clock) -> None:
        self._view = PoolView(ledger, clock)
        self.when_looked: list[Callable[[], None]] = []  # called after each look, also a vain one

    @property
    def picture(self) -> Picture | None:
        return self._view.picture

    @property
    def ledger_is_away(self) -> bool:
        return self._view.ledger_is_away

    @property
    def is_stale(self) -> bool:
        return self._view.age_s > STALE_AFTER_S

    @property
    def age_s(self) -> float:
        """Of the last look."""
        return self._view.age_s

    @property
    def members(self) -> tuple[Member, ...]:
        """Instances and memory-only lenders that live and do not drain."""
        return () if self.picture is None else self.picture.up

    @property
    def instances(self) -> list[Member]:
        """Those that take requests of this gateway."""
        return [member for member in self.members if member.takes_requests_here]

    def look(self) -> None:
        """At the ledger, which may take its time."""
        self._view.look()

    def tell(self) -> None:
        """There is a new look. What one listener cannot make of it keeps no other from it, nor the next look."""
        for listener in self.when_looked:
            try:
                listener()
            except Exception:
                logger.exception("a look at the pool came to nothing")


def request_socket_of(member: Member) -> Path:
    return Path(member.info.requests)
