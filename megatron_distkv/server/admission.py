"""Requests wait here, before any work, until the pool has room for their prompts.

The most important first, of those the oldest. Younger ones that fit may overtake for a while; then nobody overtakes the
first that the pool could hold, so that memory gathers for it: no request starves behind shorter ones that are no more
important. Other gateways have queues of their own, and instances have the last word: whom they refuse waits here
again, at its old place.
"""

import asyncio
import bisect
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from megatron_distkv import metrics
from megatron_distkv.clock import SystemClock
from megatron_distkv.config.admission import AdmissionConfig
from megatron_distkv.pool import Member, PoolCapacity
from megatron_distkv.server.attempt import Attempt
from megatron_distkv.server.capacity import InFlight, LongestContexts
from megatron_distkv.server.departures import Departures
from megatron_distkv.server.errors import ApiError
from megatron_distkv.server.pool_view import GatewayView
from megatron_distkv.server.routing import RoutingPolicy

# A request that was refused by instances asks them again after this.
ASK_AGAIN_AFTER_S = 0.25


class Waiting:
    """One request in the queue; `record` is set when there is room for it."""

    def __init__(self, attempt: Attempt) -> None:
        self.attempt = attempt
        self.record: asyncio.Future[Member] = asyncio.get_running_loop().create_future()


class Admission:
    def __init__(self, config: AdmissionConfig, view: GatewayView) -> None:
        self._config = config
        self._view = view
        self._in_flight = InFlight()
        self._routing = RoutingPolicy(view, self._in_flight)
        self._longest = LongestContexts(config.max_queue_wait_s, SystemClock())
        self._queue: list[Waiting] = []  # most important, then oldest first
        self._departures = Departures()
        view.when_looked.append(self._look)
        metrics.QUEUED_REQUESTS.set_function(lambda: len(self._queue))

    def require_possible(self, attempt: Attempt) -> None:
        """Raises ApiError for what neither fits into the pool that there is, nor into the one that was a while ago."""
        longest = self._longest.lately(attempt.pinned)
        if longest == 0:
            raise _refused(attempt.failure())
        if attempt.num_tokens_at_most > longest and not self._view.ledger_is_away:
            raise _refused(self._too_long(attempt))

    @asynccontextmanager
    async def place(self, attempt: Attempt) -> AsyncIterator[Member]:
        """An instance with room for it. Raises ApiError past the queue's bounds, or when nobody takes it."""
        try:
            yield await (self._for_lost(attempt) if attempt.has_lost else self._queued(attempt))
        finally:
            self._in_flight.remove(attempt)
            self._serve()

    # ------------------------------------------------------------------ who lost an instance

    async def _for_lost(self, attempt: Attempt) -> Member:
        """It has waited once, and its client sees a pause: it takes the first that takes it."""
        while True:
            for record in self._routing.order(attempt):
                if attempt.may_ask(record):
                    self._in_flight.add(attempt, record)
                    return record
            if not attempt.is_patient:
                raise attempt.failure()
            await asyncio.sleep(ASK_AGAIN_AFTER_S)
            attempt.forget_refusals()

    # ------------------------------------------------------------------ the queue

    async def _queued(self, attempt: Attempt) -> Member:
        waiting = Waiting(attempt)
        bisect.insort(self._queue, waiting, key=lambda other: other.attempt.rank)
        try:
            self._serve()
            if not waiting.record.done() and attempt.refusal is None:
                self._require_place()
            async with asyncio.timeout(attempt.arrival_s + self._config.max_queue_wait_s - time.monotonic()):
                record = await waiting.record
        except TimeoutError:
            raise _refused(self._too_late(attempt)) from None
        finally:
            if waiting in self._queue:
                self._queue.remove(waiting)
        if attempt.refusal is None:
            metrics.QUEUE_SECONDS.observe(time.monotonic() - attempt.arrival_s)
        return record

    def _look(self) -> None:
        if self._view.picture is not None and not self._view.ledger_is_away:
            self._longest.note(self._view.picture)
        for waiting in self._queue:
            waiting.attempt.forget_refusals()
        self._serve()

    def _serve(self) -> None:
        """Give room to all that may have it now."""
        if not self._queue or self._view.picture is None:
            return
        memory = self._memory()
        kept_for_pinned: set[str] = set()
        for waiting in [waiting for waiting in self._queue if not waiting.record.done()]:
            attempt = waiting.attempt
            has_waited = time.monotonic() - attempt.arrival_s >= self._config.overtake_within_s
            record = self._find_room(attempt, memory, kept_for_pinned, may_claim=has_waited)
            if record is not None:
                self._give(waiting, record, memory)
            elif has_waited and attempt.pinned is not None:
                kept_for_pinned.add(attempt.pinned)
            elif has_waited and attempt.num_tokens_at_most <= self._longest.now(None):
                return  # memory gathers for it

    def _give(self, waiting: Waiting, record: Member, memory: PoolCapacity | None) -> None:
        self._queue.remove(waiting)
        self._in_flight.add(waiting.attempt, record)
        self._departures.note()
        if memory is None:
            waiting.attempt.doubt_afresh()
        else:
            memory.promise(record, waiting.attempt.num_tokens_now)
        waiting.record.set_result(record)

    def _memory(self) -> PoolCapacity | None:
        """None: the ledger is away, and its last picture too old to count with; instances decide."""
        picture = self._view.picture
        if self._view.ledger_is_away or picture is None:
            return None
        return PoolCapacity(picture, self._in_flight.promised_rblocks(picture))

    def _find_room(
        self, attempt: Attempt, memory: PoolCapacity | None, kept: set[str], *, may_claim: bool
    ) -> Member | None:
        able = (x for x in self._routing.order(attempt) if x.instance not in kept and attempt.may_ask(x))
        if memory is None:
            return next(able, None)
        needed = attempt.num_tokens_now
        return next((x for x in able if memory.has_room(x, needed, may_claim=may_claim)), None)

    # ------------------------------------------------------------------ refusals

    def _require_place(self) -> None:
        if len(self._queue) > self._config.max_queued_requests:
            raise _refused(self._busy(f"{len(self._queue) - 1} requests wait for memory already", "queue_full"))

    def _too_late(self, attempt: Attempt) -> ApiError:
        longest = self._longest.now(attempt.pinned)
        if longest == 0:
            return attempt.failure()
        if attempt.num_tokens_at_most > longest:
            return self._too_long(attempt)
        if attempt.refusal is not None and attempt.refusal.status != 429:
            return attempt.refusal
        return self._busy(f"no memory became free within {self._config.max_queue_wait_s:g} s", "queue_timeout")

    def _too_long(self, attempt: Attempt) -> ApiError:
        limits = [x.info.max_context_tokens for x in self._view.instances if x.info.max_context_tokens is not None]
        longest = self._longest.now(attempt.pinned)
        if limits and attempt.num_tokens_at_most > max(limits):
            sentence = f"{attempt.lengths}; this model attends to {max(limits)} tokens at most"
        else:
            sentence = f"{attempt.lengths}; the longest that the pool's memory holds now is {longest}"
        return ApiError(400, sentence, param="prompt", code="context_length_exceeded")

    def _busy(self, why: str, code: str) -> ApiError:
        retry_s = self._departures.retry_after_s(len(self._queue))
        sentence = f"{why}; try again in {retry_s} s"
        return ApiError(429, sentence, kind="rate_limit_error", code=code, retry_after_s=retry_s)


def _refused(error: ApiError) -> ApiError:
    metrics.REFUSED_REQUESTS.labels(error.code or "bad_request").inc()
    return error
