"""A look at the ledger again and again, beside the event loop."""

import asyncio
import contextlib

from megatron_distkv.server.pool_view import GatewayView

REFRESH_INTERVAL_S = 0.25


class PoolLooks:
    """From `start`, which returns after the first, to `stop`."""

    def __init__(self, view: GatewayView) -> None:
        self._view = view
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self._look()
        self._task = asyncio.create_task(self._keep_looking())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(REFRESH_INTERVAL_S)
            await self._look()

    async def _look(self) -> None:
        await asyncio.to_thread(self._view.look)
        self._view.tell()
