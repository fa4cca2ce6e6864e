"""One serving instance: the loop that is the architecture."""

import time

from megatron_distkv.config.instance import LONELY_LEDGER, InstanceConfig
from megatron_distkv.engine.assembly import assemble
from megatron_distkv.engine.batch import Slice, StepPlan
from megatron_distkv.engine.closing import close_in_order
from megatron_distkv.engine.host_lender import open_host_lender
from megatron_distkv.engine.model_runner import StepResult
from megatron_distkv.engine.rank import Rank
from megatron_distkv.engine.sampler import SampledToken, sample
from megatron_distkv.engine.scheduler import Scheduled
from megatron_distkv.ledger import DebtLedger, Move
from megatron_distkv.log import get_logger
from megatron_distkv.messages import HandedOver, InstanceStatus, RequestRefused, TokenOutput
from megatron_distkv.request import FinishReason, Request

logger = get_logger(__name__)
# A step without any room gives creditors and debtors this long before the next try.
NO_ROOM_PAUSE_S = 0.002
# A creditor that has given a wrong answer gets nothing for this long: time for a person to look at it.
DISTRUST_S = 600.0


class Instance:
    """Rank 0 of an instance. `step()` computes tokens; `serve()` (serving.py) feeds it from a socket."""

    def __init__(self, rank: Rank, ledger: DebtLedger) -> None:
        config = rank.config
        self.config: InstanceConfig = config
        self.model = rank.model
        self._rank = rank
        self._ledger = ledger
        parts = assemble(rank, ledger)
        self._allocator = parts.allocator
        self._host = parts.host
        self._membership = parts.membership
        self._followers = parts.followers
        self._borrowing = parts.borrowing
        self._lending = parts.lending
        self._adoptions = parts.adoptions
        self._admission = parts.admission
        self._reporting = parts.reporting
        self._adopting = parts.adopting
        self._departure = parts.departure
        self._stranded = parts.stranded
        self._doors = parts.doors
        self._ways = parts.ways
        self._heartbeat = parts.heartbeat
        self.rmanager = parts.rmanager
        self.scheduler = parts.scheduler
        self._membership.join()
        self._heartbeat.start()
        self._host_lender = self._departure.host_lender = open_host_lender(config, rank.shape)
        if config.lending.enabled and config.ledger.url != LONELY_LEDGER:
            self._ways.start()

    # ------------------------------------------------------------------ requests

    def refuse(self, request: Request) -> RequestRefused | None:
        """Why this request cannot be taken, before any work is done."""
        return self._admission.refuse(request)

    def add(self, request: Request) -> None:
        request.kv_dtype = self._rank.shape.kv_name
        self.scheduler.add(request)

    def adopt(self, request: Request, adoption_id: str) -> bool:
        """Go on with a request that another instance has handed over; False: it has not, to this one."""
        return self._adopting.adopt(request, adoption_id)

    def take_farewells(self) -> list[HandedOver | RequestRefused]:
        """Requests that go on elsewhere, or nowhere, since the last time."""
        return [*self._departure.take_farewells(), *self._stranded.give_up()]

    def drain(self, within_s: float) -> None:
        """Take nothing new and give back what is lent; `is_drained` says when it may end."""
        self._departure.begin(within_s)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self._departure.is_under_way or not self.scheduler.is_idle

    @property
    def is_drained(self) -> bool:
        return self._departure.is_over

    def abort(self, request_id: str) -> None:
        request = self.scheduler.find(request_id)
        if request is not None:
            self.scheduler.finish(request, FinishReason.ABORT)

    # ------------------------------------------------------------------ a step

    def step(self) -> list[TokenOutput]:
        """Compute the next tokens of the running requests; returns what came out."""
        self._raise_if_superseded()
        self._follow_orders()
        self._departure.begin_step()
        scheduled = self.scheduler.schedule()
        plan = self._plan(scheduled)
        began_s = time.monotonic()
        result = self._run(plan)
        sampled = self._sample(scheduled, result)  # before anything counts as lost: the plan's logit rows count on it
        self.scheduler.charge_wait(scheduled, result.waited_s)
        self.rmanager.note_held_back(result.held_back_s, time.monotonic() - began_s)
        spoiled = self._lose_creditors(result)
        self.rmanager.end_step()
        outputs = self.scheduler.update([item for item in scheduled if item.request not in spoiled], sampled)
        self._departure.end_step(result.lost)
        self._adoptions.expire()
        self._reporting.update()
        return outputs

    def _plan(self, scheduled: list[Scheduled]) -> StepPlan:
        token_ids: list[int] = []
        slices: list[Slice] = []
        creditors: dict[str, str] = {}
        for item in scheduled:
            request = item.request
            start = request.next_range.start
            end = start + item.num_tokens
            token_ids.extend(request.token_ids(start, end))
            spans, open_slot = self.rmanager.spans_before(request, end), self.rmanager.open_slot(request)
            slices.append(Slice(start, end, spans, item.needs_logits, open_slot))
            creditors.update({x.creditor: x.address for x in self._borrowing.loans_of(request.request_id)})
        return StepPlan(
            self._reporting.num_steps, token_ids, slices, *self.rmanager.take_moves(), self._departure.plan(), creditors
        )

    def _run(self, plan: StepPlan) -> StepResult:
        if not (plan.token_ids or plan.moves or plan.pulls or plan.pushes):
            time.sleep(0 if self.scheduler.is_idle else NO_ROOM_PAUSE_S)
            return StepResult(None, {})
        self._reporting.num_steps += 1
        self._reporting.num_computed_tokens += len(plan.token_ids)
        if self._followers is None:
            return self._rank.runner.run(plan)
        self._followers.begin_step(plan)
        result = self._rank.runner.run(plan)
        theirs = self._followers.end_step()
        return result._replace(lost={**result.lost, **theirs.lost}, wrong=result.wrong.union(theirs.wrong))

    def _sample(self, scheduled: list[Scheduled], result: StepResult) -> dict[str, SampledToken]:
        wanted = [item.request for item in scheduled if item.needs_logits]
        if result.logits_RV is None or not wanted:
            return {}
        tokens = sample(result.logits_RV, wanted)
        return {request.request_id: token for request, token in zip(wanted, tokens, strict=True)}

    def _lose_creditors(self, result: StepResult) -> list[Request]:
        """What lay at lost creditors is computed again; returns the requests whose tokens of this step mean nothing.

        Their clients see a pause, and the same tokens.
        """
        spoiled: list[Request] = []
        for creditor, reason in result.lost.items():
            self._rank.peers.shun(creditor, DISTRUST_S if creditor in result.wrong else self.config.ledger.lease_s)
            requests = self.rmanager.lose_creditor(creditor)
            num_tokens = sum(request.num_lost_tokens for request in requests)
            what = f"{len(requests)} requests compute {num_tokens} tokens again"
            logger.warning("lost creditor %s (%s): %s", creditor, reason, what)
            spoiled += requests
        return spoiled

    def _follow_orders(self) -> None:
        while not self._heartbeat.orders.empty():
            order = self._heartbeat.orders.get()
            if isinstance(order, Move):
                self.rmanager.move_to(order.request_id, order.num_rblocks, order.destination)
            else:
                self.rmanager.recall(order.loan_id)

    # ------------------------------------------------------------------ the pool

    def _raise_if_superseded(self) -> None:
        if self._heartbeat.superseded is not None:
            raise self._heartbeat.superseded

    def status(self, query_id: int) -> InstanceStatus:
        return self._reporting.status(query_id)

    def check_integrity(self) -> None:
        with self._adoptions.held() as kept_for_others:
            self.rmanager.check_integrity(kept_for_others, self._adoptions.ids)

    def note_idle(self) -> None:
        """Let the next heartbeat say that nothing runs, and what is kept for requests of others."""
        self._adoptions.expire()
        self._reporting.update()

    def close(self) -> None:
        """Give back what is borrowed, leave the ledger, stop the followers, remove the sockets."""
        close_in_order(
            [
                self._ways.stop,
                self._heartbeat.stop,
                self._finish_all,
                *([self._host_lender.close] if self._host_lender is not None else []),
                self._membership.leave,
                self._doors.close,
                *([self._followers.stop] if self._followers is not None else []),
                self._rank.peers.close,
                self._ledger.close,
            ]
        )

    def _finish_all(self) -> None:
        for request in [*self.scheduler.running, *self.scheduler.waiting]:
            self.scheduler.finish(request, FinishReason.ABORT)
