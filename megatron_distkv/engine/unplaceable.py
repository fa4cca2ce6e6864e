"""Requests that make no progress here: for good, or for so long that another instance should try."""

from typing import NamedTuple

from megatron_distkv.clock import Clock
from megatron_distkv.engine.admission import InstanceAdmission
from megatron_distkv.engine.scheduler import Scheduler
from megatron_distkv.log import get_logger
from megatron_distkv.messages import RequestRefused
from megatron_distkv.request import Request

logger = get_logger(__name__)
# For so long somebody may come (back) with memory for them: as long as a gateway looks for another instance.
PATIENCE_S = 30.0
# A request that gets no memory here for so long goes back to its gateway, which may know a better place. Sooner than
# the scheduler lets a request hold up those behind it.
NO_PROGRESS_S = 15.0


class _Progress(NamedTuple):
    """How far a request had come, and for how long it has lacked memory without coming further."""

    num_output_tokens: int
    num_computed_tokens: int  # at most: a preemption is no progress, nor is what it has to compute again
    starved_s: float


class Unplaceable:
    """The engine's thread calls it."""

    def __init__(self, admission: InstanceAdmission, scheduler: Scheduler, clock: Clock) -> None:
        self._admission = admission
        self._scheduler = scheduler
        self._clock = clock
        self._never_fit_since_s: dict[str, float] = {}
        self._progress: dict[str, _Progress] = {}
        self._looked_at_s = clock.monotonic_s()

    def give_up(self) -> list[RequestRefused]:
        """They are let go; the gateway asks elsewhere, or tells the client. After each step."""
        refused = [*self._that_never_fit(), *self._without_progress()]
        for message in refused:
            logger.warning("%s is given up: %s", message.request_id, message.message)
        return refused

    def _that_never_fit(self) -> list[RequestRefused]:
        """They wait for memory that no present member has."""
        now_s = self._clock.monotonic_s()
        hopeless = [request for request in self._scheduler.waiting if self._admission.never_fits_now(request)]
        self._never_fit_since_s = {x.request_id: self._never_fit_since_s.get(x.request_id, now_s) for x in hopeless}
        longest = self._admission.longest_context_tokens()
        sentence = "its {} tokens no longer fit: the pool has shrunk, and the longest is {}"
        return [
            self._refuse(x, "too_long", sentence.format(x.num_tokens, longest))
            for x in hopeless
            if now_s - self._never_fit_since_s[x.request_id] > PATIENCE_S
        ]

    def _without_progress(self) -> list[RequestRefused]:
        now_s = self._clock.monotonic_s()
        passed_s, self._looked_at_s = now_s - self._looked_at_s, now_s
        requests = [*self._scheduler.waiting, *self._scheduler.running]
        self._progress = {x.request_id: self._note(x, passed_s) for x in requests}
        stuck = [x for x in requests if self._progress[x.request_id].starved_s > NO_PROGRESS_S]
        sentence = f"it has got no memory here for {NO_PROGRESS_S:.0f} s"
        return [
            self._refuse(request, "no_progress", sentence)
            for request in stuck
            if request.request_id not in self._never_fit_since_s
        ]

    def _note(self, request: Request, passed_s: float) -> _Progress:
        now = _Progress(len(request.output_token_ids), request.num_computed_tokens, 0.0)
        before = self._progress.get(request.request_id, now)
        if now[:2] > before[:2]:
            return now
        is_starved = request.request_id in self._scheduler.starved
        return before._replace(starved_s=before.starved_s + passed_s * is_starved)

    def _refuse(self, request: Request, code: str, sentence: str) -> RequestRefused:
        self._scheduler.let_go(request)
        return RequestRefused(request.request_id, code, sentence)
