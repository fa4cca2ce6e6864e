"""The gateway's picture of the pool: the ledger's snapshot, read again and again."""

import asyncio
import contextlib
import json
from collections.abc import Callable
from pathlib import Path

from megatron_distkv.errors import LedgerUnavailable
from megatron_distkv.ledger import DebtLedger, InstanceRecord, InstanceState, PoolSnapshot
from megatron_distkv.log import get_logger
from megatron_distkv.transport import is_elsewhere

logger = get_logger(__name__)
REFRESH_INTERVAL_S = 0.25


class PoolView:
    """While the ledger is away the last picture stays: instances are then tried, and found gone or not."""

    def __init__(self, ledger: DebtLedger) -> None:
        self._ledger = ledger
        self.when_looked: list[Callable[[], None]] = []  # called after each look, also a vain one
        self._task: asyncio.Task[None] | None = None
        self.snapshot: PoolSnapshot | None = None
        self.ledger_is_away = False

    async def start(self) -> None:
        await self._refresh()
        self._task = asyncio.create_task(self._keep_fresh())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    @property
    def members(self) -> list[InstanceRecord]:
        """Instances and memory-only lenders that live and do not drain."""
        if self.snapshot is None:
            return []
        return [record for record in self.snapshot.live if record.state is InstanceState.UP]

    @property
    def instances(self) -> list[InstanceRecord]:
        """Those that take requests of this gateway."""
        return [record for record in self.members if takes_requests_here(record)]

    async def _keep_fresh(self) -> None:
        while True:
            await asyncio.sleep(REFRESH_INTERVAL_S)
            await self._refresh()

    async def _refresh(self) -> None:
        try:
            self.snapshot = await asyncio.to_thread(self._ledger.snapshot)
            self.ledger_is_away = False
        except LedgerUnavailable as error:
            if not self.ledger_is_away:
                logger.warning("the ledger is away: %s", error)
            self.ledger_is_away = True
        for listener in self.when_looked:
            listener()


def takes_requests_here(record: InstanceRecord) -> bool:
    """A gateway speaks to instances through their unix sockets: those of other hosts only lend to its own."""
    return record.takes_requests and not is_elsewhere(record.address)


def request_socket_of(record: InstanceRecord) -> Path:
    return Path(record.info["requests"])


def eos_token_ids_of(record: InstanceRecord) -> list[int]:
    return list(json.loads(record.info["eos_token_ids"]))
