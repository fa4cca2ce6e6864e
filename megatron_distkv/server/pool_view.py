"""The gateway's eye on the pool: a look at the ledger again and again, beside the event loop."""

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path

from megatron_distkv.clock import SystemClock
from megatron_distkv.log import get_logger
from megatron_distkv.pool import DebtLedger, Member, Picture, PoolView
from megatron_distkv.transport import is_elsewhere

logger = get_logger(__name__)
REFRESH_INTERVAL_S = 0.25
# Looks that are this old mean that nobody looks any more; a ledger that is silent costs a second each time.
STALE_AFTER_S = 10.0


class GatewayView:
    """What the pool looks like, on the event loop."""

    def __init__(self, ledger: DebtLedger) -> None:
        self._view = PoolView(ledger, SystemClock())
        self.when_looked: list[Callable[[], None]] = []  # called after each look, also a vain one
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self._look()
        self._task = asyncio.create_task(self._keep_looking())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

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
        return [member for member in self.members if takes_requests_here(member)]

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(REFRESH_INTERVAL_S)
            await self._look()

    async def _look(self) -> None:
        await asyncio.to_thread(self._view.look)
        self.tell()

    def tell(self) -> None:
        """There is a new look. What one listener cannot make of it keeps no other from it, nor the next look."""
        for listener in self.when_looked:
            try:
                listener()
            except Exception:
                logger.exception("a look at the pool came to nothing")


def takes_requests_here(member: Member) -> bool:
    """A gateway speaks to instances through their unix sockets: those of other hosts only lend to its own."""
    return member.takes_requests and not is_elsewhere(member.address)


def request_socket_of(member: Member) -> Path:
    return Path(member.info.requests)
