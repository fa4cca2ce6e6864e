"""Requests wait here, before any work, until the pool has room for their prompts.

The most important first, of those the oldest. Younger ones that fit may overtake for a while. Then memory gathers for
the first that the pool could hold: only much shorter ones still pass it, and not many, so that no request starves.
Other gateways have queues of their own, and instances have the last word: a request that they refuse waits here
again, at its old place.
"""

import bisect
from dataclasses import dataclass
from typing import Protocol

from megatron_distkv import metrics
from megatron_distkv.clock import Clock
from megatron_distkv.config.admission import AdmissionConfig
from megatron_distkv.pool import Member, PoolCapacity
from megatron_distkv.server.attempt import Attempt
from megatron_distkv.server.capacity import InFlight, LongestContexts
from megatron_distkv.server.departures import Departures
from megatron_distkv.server.errors import ApiError
from megatron_distkv.server.pool_view import GatewayView
from megatron_distkv.server.routing import RoutingPolicy

# For a request that waits for longer, its instance takes back what it has lent.
CLAIM_AFTER_S = 2.0
# While memory gathers for a request, others pass it that need this part of it at most, and together no more than that:
# they delay it by little more than the time that one of them takes.
PASSING_SIZE = 1 / 8
PASSING_SHARE = 1 / 2


class Place(Protocol):
    """Where a request hears of its instance: a future of the event loop, or of virtual time."""

    def done(self) -> bool:
        """It has heard, or does not wait any more."""
        ...

    def set_result(self, member: Member, /) -> None: ...


@dataclass
class Waiting:
    attempt: Attempt
    place: Place
    num_passed_tokens: int = 0
    """Of those that have passed it while memory gathered for it."""

    def lets_pass(self, other: Attempt) -> bool:
        own = self.attempt.num_tokens_at_most
        is_short = other.num_tokens_at_most <= own * PASSING_SIZE
        return is_short and self.num_passed_tokens + other.num_tokens_at_most <= own * PASSING_SHARE


class Admission:
    """Waits for nothing itself: each look at the pool, and each request that ends, may give room to others."""

    def __init__(self, config: AdmissionConfig, view: GatewayView, clock: Clock) -> None:
        self._config = config
        self._clock = clock
        self._view = view
        self._in_flight = InFlight()
        self._routing = RoutingPolicy(view, self._in_flight)
        self._longest = LongestContexts(config.max_queue_wait_s, clock)
        self._queue: list[Waiting] = []  # most important, then oldest first
        self._departures = Departures(clock)
        view.when_looked.append(self._look)
        metrics.QUEUED_REQUESTS.set_function(lambda: len(self._queue))

    def require_possible(self, attempt: Attempt) -> None:
        """Raises ApiError for what neither fits into the pool that there is, nor into the one that was a while ago."""
        longest = self._longest.lately(attempt.pinned)
        if longest == 0:
            raise _refused(attempt.failure())
        if attempt.num_tokens_at_most > longest and not self._view.ledger_is_away:
            raise _refused(self._too_long(attempt))

    def place_at_once(self, attempt: Attempt) -> Member | None:
        """One that has lost its instance has waited once, and its client sees a pause: the first that takes it.

        None: nobody for now. Raises ApiError when its patience is over.
        """
        for member in self._routing.order(attempt):
            if attempt.may_ask(member):
                self._in_flight.add(attempt, member)
                return member
        if not attempt.is_patient:
            raise attempt.failure()
        return None

    def end(self, attempt: Attempt) -> None:
        """It needs no instance any more, or another one: its room is for others."""
        self._in_flight.remove(attempt)
        self._serve()

    def note_prefilled(self, attempt: Attempt) -> None:
        """Its first token has come."""
        self._in_flight.note_prefilled(attempt)

    # ------------------------------------------------------------------ the queue

    def enter(self, attempt: Attempt, place: Place) -> None:
        """It waits until `place` names its instance, which may be at once. Raises ApiError in a full queue."""
        bisect.insort(self._queue, Waiting(attempt, place), key=lambda other: other.attempt.rank)
        self._serve()
        if not place.done() and attempt.refusal is None:
            self._require_place()

    def may_wait_s(self, attempt: Attempt) -> float:
        """For how much longer; not above 0: it is too late."""
        return attempt.arrival_s + self._config.max_queue_wait_s - self._clock.monotonic_s()

    def leave(self, attempt: Attempt) -> None:
        """It waits no more."""
        self._queue = [waiting for waiting in self._queue if waiting.attempt is not attempt]

    def _look(self) -> None:
        if self._view.picture is not None and not self._view.ledger_is_away:
            self._longest.note(self._view.picture)
            self._in_flight.note_reports(self._view.picture)
        for waiting in self._queue:
            waiting.attempt.forget_refusals()
        self._serve()

    def _serve(self) -> None:
        """Give room to all that may have it now."""
        if not self._queue or self._view.picture is None:
            return
        memory = self._memory()
        kept_for_pinned: set[str] = set()
        first: Waiting | None = None  # that memory gathers for
        for waiting in [waiting for waiting in self._queue if not waiting.place.done()]:
            attempt = waiting.attempt
            if first is not None and not first.lets_pass(attempt):
                continue
            waited_s = self._clock.monotonic_s() - attempt.arrival_s
            has_waited = waited_s >= self._config.overtake_within_s
            may_claim = first is None and waited_s >= min(CLAIM_AFTER_S, self._config.overtake_within_s)
            record = self._find_room(attempt, memory, kept_for_pinned, may_claim=may_claim)
            if record is not None:
                if first is not None:
                    first.num_passed_tokens += attempt.num_tokens_at_most
                self._give(waiting, record, memory)
            elif has_waited and attempt.pinned is not None:
                kept_for_pinned.add(attempt.pinned)
            elif first is None and has_waited and attempt.num_tokens_at_most <= self._longest.now(None):
                first = waiting

    def _give(self, waiting: Waiting, record: Member, memory: PoolCapacity | None) -> None:
        self.leave(waiting.attempt)
        self._in_flight.add(waiting.attempt, record)
        self._departures.note()
        if waiting.attempt.refusal is None:
            metrics.QUEUE_SECONDS.observe(self._clock.monotonic_s() - waiting.attempt.arrival_s)
        if memory is None:
            waiting.attempt.doubt_afresh()
        else:
            memory.promise(record, waiting.attempt.num_tokens_now)
        waiting.place.set_result(record)

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

    def too_late(self, attempt: Attempt) -> ApiError:
        """Why it has waited in vain."""
        return _refused(self._why_too_late(attempt))

    def _why_too_late(self, attempt: Attempt) -> ApiError:
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
