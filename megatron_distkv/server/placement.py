"""Admission for tasks of the event loop: a task waits here until its request has an instance."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from megatron_distkv.pool import Member
from megatron_distkv.server.admission import Admission
from megatron_distkv.server.attempt import Attempt

# A request that was refused by instances asks them again after this.
ASK_AGAIN_AFTER_S = 0.25


@asynccontextmanager
async def placed(attempt: Attempt, admission: Admission) -> AsyncIterator[Member]:
    """An instance with room for it. Raises ApiError past the queue's bounds, or when nobody takes it."""
    try:
        yield await (_for_lost(attempt, admission) if attempt.has_lost else _queued(attempt, admission))
    finally:
        admission.end(attempt)


async def _for_lost(attempt: Attempt, admission: Admission) -> Member:
    while (member := admission.place_at_once(attempt)) is None:
        await asyncio.sleep(ASK_AGAIN_AFTER_S)
        attempt.forget_refusals()
    return member


async def _queued(attempt: Attempt, admission: Admission) -> Member:
    place: asyncio.Future[Member] = asyncio.get_running_loop().create_future()
    try:
        admission.enter(attempt, place)
        async with asyncio.timeout(admission.may_wait_s(attempt)):
            return await place
    except TimeoutError:
        raise admission.too_late(attempt) from None
    finally:
        admission.leave(attempt)
