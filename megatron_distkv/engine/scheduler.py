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
# A long prompt gets at least this share of the token budget, so that short ones cannot starve it, and no more than that
# before all that wait have been looked at: who comes behind a long prompt must not wait for all of it.
LONG_PROMPT_SHARE = 0.25
# What has been preempted is preempted again within this time only where nobody else could be.
SPARED_FOR_S = 10.0
# A step that is longer than it should be is no reason to preempt anybody: memory comes with steps, not with seconds.
PREEMPT_AFTER_STEPS = 4


class Scheduled(NamedTuple):
    """The next `num_tokens` tokens of a request are computed in this step."""

    request: Request
    num_tokens: int

    @property
    def needs_logits(self) -> bool:
        return self.num_tokens == self.request.num_to_compute


class _Step:
    """What has been chosen for a step so far, and what is left of its token budget."""

    def __init__(self, max_tokens: int) -> None:
        self.left = max_tokens
        self.chosen: dict[str, Scheduled] = {}

    def num_chosen(self, request: Request) -> int:
        item = self.chosen.get(request.request_id)
        return 0 if item is None else item.num_tokens

    def left_for(self, request: Request) -> int:
        """With what it has already."""
        return self.left + self.num_chosen(request)

    def share(self) -> int:
        """Of what is left, for one long prompt before others."""
        return min(self.left, max(1, int(self.left * LONG_PROMPT_SHARE)))

    def choose(self, request: Request, num_tokens: int) -> None:
        """In place of what it has."""
        self.drop(request)
        self.chosen[request.request_id] = Scheduled(request, num_tokens)
        self.left -= num_tokens

    def drop(self, request: Request) -> None:
        item = self.chosen.pop(request.request_id, None)
        self.left += 0 if item is None else item.num_tokens


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
        """Requests and token counts of the next step. The rManager has made room for exactly these tokens.

        First decodes, a share for the oldest prompt, and the prompts that end with this step; then who waits; last the
        remainders of long prompts. Important ones come first in each group, then those with least left.
        """
        self._rmanager.begin_step()
        self.starved.clear()
        step = _Step(self._config.max_batched_tokens)
        for request in [request for request in self.running if request.num_to_compute == 1]:
            self._choose(request, min(1, step.left), step)
        self._choose_prompts(step)
        self._admit(step)
        for request in self._prompts():
            if request.request_id not in self.starved:
                self._choose(request, step.left_for(request), step)
        self._rmanager.borrow_ahead()
        for request in self._rmanager.fetch_back():
            logger.info("no room for what a creditor wants back: %d tokens again", request.num_lost_tokens)
            step.drop(request)
        self._note_memory()
        return list(step.chosen.values())

    def _prompts(self) -> list[Request]:
        """Those that run: important ones first, then those with least left."""
        prompts = [request for request in self.running if request.num_to_compute > 1]
        return sorted(prompts, key=lambda request: (request.sampling.priority, request.num_to_compute))

    def _choose_prompts(self, step: _Step) -> None:
        """The oldest one's share, and all that end with this step; all of them where nobody waits."""
        prompts = self._prompts()
        if len(prompts) + len(self.waiting) > 1 and prompts:
            oldest = min(prompts, key=lambda request: request.importance)
            self._choose(oldest, step.share(), step)
        for request in prompts:
            left = step.left_for(request)
            if not self.waiting or request.num_to_compute <= left:
                self._choose(request, left, step)

    def _choose(self, request: Request, budget: int, step: _Step) -> None:
        wanted = min(len(request.next_range), budget)
        if wanted <= step.num_chosen(request) or request.status is not RequestStatus.RUNNING:
            return
        granted = self._rmanager.grow(request, wanted)
        if granted > 0:
            self._waits.pop(request.request_id, None)
            step.choose(request, granted)
        elif request.request_id not in step.chosen:
            self._without_room(request, step)

    def _without_room(self, request: Request, step: _Step) -> None:
        """Wait a little; then take the room of somebody less important, or give up the own where there is nobody."""
        self.starved.add(request.request_id)
        self._rmanager.ask_back_for(request)
        wait, victim = self._wait_of(request), self._victim_for(request)
        patience_s = wait.gives_up_after_s if victim is request else self._preempts_after_s
        patience_s += 2 * self._rmanager.loan_latency_s  # what was wished for may still come
        if victim is not None and self._clock.monotonic_s() - wait.since_s > patience_s:
            step.drop(victim)
            self.preempt(victim)

    def _victim_for(self, request: Request) -> Request | None:
        """Who makes room for it: of those less important the one that loses the least, but for the just preempted.

        The least important of all gives up itself. None: all less important ones are spared for now.
        """
        if self.running[-1] is request:
            return request
        others = self.running[self.running.index(request) + 1 :]
        lowest = others[-1].sampling.priority
        others = [x for x in others if x.sampling.priority == lowest and not self._is_spared(x)]
        return min(reversed(others), key=lambda other: other.num_computed_tokens, default=None)  # of equals the latest

    def _is_spared(self, request: Request) -> bool:
        return self._clock.monotonic_s() - request.preempted_at_s < SPARED_FOR_S

    @property
    def _preempts_after_s(self) -> float:
        return max(PREEMPT_AFTER_S, PREEMPT_AFTER_STEPS * self._rmanager.step_s)

    def _wait_of(self, request: Request) -> _Wait:
        fresh = _Wait(self._clock.monotonic_s(), GIVE_UP_AFTER_S * (1 + self._clock.random.random()))
        return self._waits.setdefault(request.request_id, fresh)

    def _admit(self, step: _Step) -> None:
        waiting = sorted(self.waiting, key=lambda request: request.importance)
        for request in waiting:
            if step.left <= 0:
                return
            if self._num_free_places > 0 and self._rmanager.can_admit(request):
                is_long = len(request.next_range) > step.left and request is not waiting[-1]
                self._start(request)
                self._choose(request, step.share() if is_long else step.left, step)
            elif self._displaces(request, step) or self._num_free_places <= 0:
                return  # what has become free is the more important one's, in the next step
            else:
                self.starved.add(request.request_id)
                self._rmanager.ask_back_for(request)
                if self._clock.monotonic_s() - request.arrival_s > NO_OVERTAKING_AFTER_S:
                    return

    def _displaces(self, request: Request, step: _Step) -> bool:
        """Whether a running request of a lower priority makes room for this one, which has waited a little."""
        last = self.running[-1] if self.running else request
        if last.sampling.priority <= request.sampling.priority:
            return False
        if self._clock.monotonic_s() - self._wait_of(request).since_s <= self._preempts_after_s:
            return False
        step.drop(last)
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
        logger.info("preempting %s: %d tokens again", request.request_id, request.num_computed_tokens)
        self._leave(request)
        request.start_over()
        request.preempted_at_s = self._clock.monotonic_s()
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
