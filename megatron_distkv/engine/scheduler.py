"""Chooses what each step computes.

There is no prefill or decode phase: every step only lets each request's computed tokens catch up with its tokens,
within a token budget. A decode is one token behind, a new prompt is its whole length behind.
"""

from collections import deque
from typing import NamedTuple

from megatron_distkv.clock import Clock
from megatron_distkv.config.instance import SchedulerConfig
from megatron_distkv.engine.kv_meter import KVMeter
from megatron_distkv.engine.sampled_token import SampledToken
from megatron_distkv.log import get_logger
from megatron_distkv.messages import TokenLogprobs, TokenOutput, receipt_of
from megatron_distkv.request import FinishReason, Request, RequestStatus
from megatron_distkv.rmanager import RManager

logger = get_logger(__name__)
# A request without room waits this long before a less important one is preempted for it: moves and repayments take
# some steps.
PREEMPT_AFTER_S = 0.2
# The least important, without room, gives up its own memory after this long (times 1 to 2, at random): two instances
# that each hold half of what both need would otherwise wait for each other for ever.
GIVE_UP_AFTER_S = 2.0
# Nobody overtakes a waiting request that has waited this long.
NO_OVERTAKING_AFTER_S = 20.0
# The oldest unfinished prompt gets at least this share of the token budget, so that short prompts cannot starve it.
OLDEST_PROMPT_SHARE = 0.25


class Scheduled(NamedTuple):
    """The next `num_tokens` tokens of a request are computed in this step."""

    request: Request
    num_tokens: int

    @property
    def needs_logits(self) -> bool:
        return self.num_tokens == self.request.num_to_compute


class _Wait(NamedTuple):
    """A running request without room: since when, and (drawn once, or the shortest draw would win) for how long."""

    since_s: float
    gives_up_after_s: float


class Scheduler:
    def __init__(self, config: SchedulerConfig, rmanager: RManager, clock: Clock) -> None:
        self._config = config
        self._clock = clock
        self._rmanager = rmanager
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # the most important first; of equals the oldest
        self.num_preemptions = 0
        self.starved: set[str] = set()
        """Requests for which the last step found no memory."""
        self._waits: dict[str, _Wait] = {}
        self._meter = KVMeter(clock)

    @property
    def is_full(self) -> bool:
        return len(self.waiting) >= self._config.max_waiting_requests + self._num_free_places

    @property
    def is_idle(self) -> bool:
        return not self.waiting and not self.running

    @property
    def _num_free_places(self) -> int:
        return self._config.max_running_requests - len(self.running)

    def add(self, request: Request) -> None:
        """It is new here, and waits."""
        request.arrive(self._clock)
        self.waiting.append(request)

    def find(self, request_id: str) -> Request | None:
        return next((x for x in (*self.running, *self.waiting) if x.request_id == request_id), None)

    # ------------------------------------------------------------------ schedule

    def schedule(self) -> list[Scheduled]:
        """Requests and token counts of the next step. The rManager has made room for exactly these tokens."""
        self._rmanager.begin_step()
        self.starved.clear()
        chosen: dict[str, Scheduled] = {}
        budget = self._config.max_batched_tokens
        for request, share in self._by_urgency(budget):
            if request.status is RequestStatus.RUNNING and budget > 0:
                self._choose(request, min(share, budget), chosen)
                budget = self._config.max_batched_tokens - sum(item.num_tokens for item in chosen.values())
        self._admit(budget, chosen)
        self._rmanager.borrow_ahead()
        for request in self._rmanager.fetch_back():
            logger.info("no room for what a creditor wants back: %d tokens again", request.num_lost_tokens)
            chosen.pop(request.request_id, None)
        self._note_memory()
        return list(chosen.values())

    def _by_urgency(self, budget: int) -> list[tuple[Request, int]]:
        """Decodes first, then a share for the oldest prompt, then the prompts with least left; important ones first."""
        prompts = [request for request in self.running if request.num_to_compute > 1]
        order = [(request, 1) for request in self.running if request.num_to_compute == 1]
        if len(prompts) > 1:
            order.append((prompts[0], max(1, int(budget * OLDEST_PROMPT_SHARE))))
        prompts.sort(key=lambda request: (request.sampling.priority, request.num_to_compute))
        order += [(request, budget) for request in prompts]
        return order

    def _choose(self, request: Request, budget: int, chosen: dict[str, Scheduled]) -> None:
        wanted = min(len(request.next_range), budget)
        granted = self._rmanager.grow(request, wanted)
        if granted > 0:
            self._waits.pop(request.request_id, None)
            chosen[request.request_id] = Scheduled(request, granted)
        elif request.request_id not in chosen:
            self._without_room(request, chosen)

    def _without_room(self, request: Request, chosen: dict[str, Scheduled]) -> None:
        """Wait a little; then take the room of the least important, which may be the request itself."""
        self.starved.add(request.request_id)
        self._rmanager.ask_back_for(request)
        wait, last = self._wait_of(request), self.running[-1]
        patience_s = wait.gives_up_after_s if last is request else PREEMPT_AFTER_S
        patience_s += 2 * self._rmanager.loan_latency_s  # what was wished for may still come
        if self._clock.monotonic_s() - wait.since_s > patience_s:
            chosen.pop(last.request_id, None)
            self.preempt(last)

    def _wait_of(self, request: Request) -> _Wait:
        fresh = _Wait(self._clock.monotonic_s(), GIVE_UP_AFTER_S * (1 + self._clock.random.random()))
        return self._waits.setdefault(request.request_id, fresh)

    def _admit(self, budget: int, chosen: dict[str, Scheduled]) -> None:
        for request in sorted(self.waiting, key=lambda request: request.importance):
            if budget <= 0:
                return
            if self._num_free_places > 0 and self._rmanager.can_admit(request):
                granted = self._rmanager.grow(request, min(len(request.next_range), budget))
                self._start(request)
                if granted > 0:
                    chosen[request.request_id] = Scheduled(request, granted)
                    budget -= granted
            elif self._displaces(request, chosen) or self._num_free_places <= 0:
                return  # what has become free is the more important one's, in the next step
            else:
                self.starved.add(request.request_id)
                self._rmanager.ask_back_for(request)
                if self._clock.monotonic_s() - request.arrival_s > NO_OVERTAKING_AFTER_S:
                    return

    def _displaces(self, request: Request, chosen: dict[str, Scheduled]) -> bool:
        """Whether a running request of a lower priority makes room for this one, which has waited a little."""
        last = self.running[-1] if self.running else request
        if last.sampling.priority <= request.sampling.priority:
            return False
        if self._clock.monotonic_s() - self._wait_of(request).since_s <= PREEMPT_AFTER_S:
            return False
        chosen.pop(last.request_id, None)
        self.preempt(last)
        return True

    def _start(self, request: Request) -> None:
        self.waiting.remove(request)
        self._waits.pop(request.request_id, None)
        self.enter(request)

    def enter(self, request: Request) -> None:
        """It runs from now on; the rManager knows it."""
        request.status = RequestStatus.RUNNING
        self.running.append(request)
        self.running.sort(key=lambda other: other.importance)

    def _note_memory(self) -> None:
        for request in self.running:
            self._meter.note(request, self._rmanager.table(request))

    # ------------------------------------------------------------------ endings

    def preempt(self, request: Request) -> None:
        """Give up a running request's memory; it will be computed again from its tokens."""
        logger.info("preempting %s after %d tokens", request.request_id, request.num_computed_tokens)
        self._leave(request)
        request.start_over()
        self.num_preemptions += 1
        self.waiting.appendleft(request)

    def finish(self, request: Request, reason: FinishReason) -> TokenOutput:
        """End a request at once; returns its last message."""
        self.let_go(request)
        request.finish(reason)
        return _output(request, [], [])

    def give_up_all(self) -> list[TokenOutput]:
        """This instance ends before its requests: others go on, and this is its part of each, without tokens."""
        for request in self.running:
            self._meter.settle(request)
        return [TokenOutput(x.request_id, [], kv=receipt_of(x)) for x in (*self.running, *self.waiting)]

    def let_go(self, request: Request) -> None:
        """It goes on elsewhere, or nowhere."""
        if request in self.waiting:
            self.waiting.remove(request)
            self._waits.pop(request.request_id, None)
        else:
            self._leave(request)

    def settle(self, request: Request) -> None:
        """Let its receipt say what it has held until now."""
        self._meter.settle(request)

    def _leave(self, request: Request) -> None:
        self.running.remove(request)
        self._waits.pop(request.request_id, None)
        self._meter.settle(request)
        self._rmanager.release(request)

    # ------------------------------------------------------------------ update

    def charge_wait(self, computed: list[Scheduled], waited_s: float) -> None:
        """The step that computed these waited so long for creditors."""
        self._meter.charge_wait(computed, waited_s)

    def update(self, done: list[Scheduled], sampled: dict[str, SampledToken]) -> list[TokenOutput]:
        """The step is done: count its tokens, append what was sampled, end what is complete."""
        outputs = []
        for request, num_tokens in done:
            request.note_computed(num_tokens)
            token = sampled.get(request.request_id)
            if token is not None:
                request.append_token(token.token_id)
                if request.finish_reason is not None:
                    self._leave(request)
                outputs.append(_output(request, [token.token_id], [token.logprobs] if token.logprobs else []))
        return outputs


def _output(request: Request, token_ids: list[int], logprobs: list[TokenLogprobs]) -> TokenOutput:
    is_last = request.finish_reason is not None
    return TokenOutput(
        request_id=request.request_id,
        token_ids=token_ids,
        logprobs=logprobs or None,
        finish_reason=request.finish_reason.value if request.finish_reason is not None else None,
        kv=receipt_of(request) if is_last else None,
    )
