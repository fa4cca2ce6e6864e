"""Requests for which the pool has become too small: members have left it or were lost since they were taken."""

import time

from megatron_distkv.engine.admission import Admission
from megatron_distkv.engine.scheduler import Scheduler
from megatron_distkv.log import get_logger
from megatron_distkv.messages import RequestRefused
from megatron_distkv.request import Request

logger = get_logger(__name__)
# For so long somebody may come (back) with memory for them: as long as a gateway looks for another instance.
PATIENCE_S = 30.0


class Stranded:
    """The engine's thread calls it."""

    def __init__(self, admission: Admission, scheduler: Scheduler) -> None:
        self._admission = admission
        self._scheduler = scheduler
        self._since_s: dict[str, float] = {}

    def give_up(self) -> list[RequestRefused]:
        """Requests that wait here, and have waited long for memory that nobody has; they are let go."""
        now_s = time.monotonic()
        stranded = [request for request in self._scheduler.waiting if self._admission.never_fits_now(request)]
        self._since_s = {x.request_id: self._since_s.get(x.request_id, now_s) for x in stranded}
        return [self._refuse(x) for x in stranded if now_s - self._since_s[x.request_id] > PATIENCE_S]

    def _refuse(self, request: Request) -> RequestRefused:
        self._scheduler.let_go(request)
        longest = self._admission.longest_context_tokens()
        logger.warning("%s: its %d tokens fit nowhere any more", request.request_id, request.num_tokens)
        sentence = f"its {request.num_tokens} tokens no longer fit: the pool has shrunk, and the longest is {longest}"
        return RequestRefused(request.request_id, "too_long", sentence)
