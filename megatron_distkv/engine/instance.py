"""One serving instance: the loop that is the architecture."""

from collections.abc import Callable

from megatron_distkv.config.instance import InstanceConfig
from megatron_distkv.engine.assembly import Parts
from megatron_distkv.engine.batch import Slice, StepPlan
from megatron_distkv.engine.closing import close_in_order
from megatron_distkv.engine.model_runner import StepResult
from megatron_distkv.engine.rank import Rank
from megatron_distkv.engine.sampled_token import SampledToken
from megatron_distkv.engine.sampler import sample
from megatron_distkv.engine.scheduler import Scheduled
from megatron_distkv.log import get_logger
from megatron_distkv.messages import HandedOver, InstanceStatus, RequestRefused, TokenOutput
from megatron_distkv.pool import DebtLedger, MoveOrder, Peer, RequestOwner
from megatron_distkv.request import FinishReason, Request

logger = get_logger(__name__)
# A step without any room gives creditors and debtors this long before the next try.
NO_ROOM_PAUSE_S = 0.002
# A creditor that has given a wrong answer gets nothing for this long: time for a person to look at it.
DISTRUST_S = 600.0
# An instance that ends waits for its creditors and the ledger to hear of it; who did not, finds its lease ended.
RETURN_WITHIN_S = 3.0


class Instance:
    """Rank 0 of an instance. `step()` computes tokens; `serve()` (serving.py) feeds it from a socket."""

    def __init__(self, rank: Rank, ledger: DebtLedger) -> None:
        """Raises UserError."""
        self.config: InstanceConfig = rank.config
        self.model = rank.model
        self.parts = parts = Parts(rank, ledger)
        self.rmanager = parts.rmanager
        self.scheduler = parts.scheduler
        self._failed: list[RequestRefused] = []
        self.when_begun: Callable[[list[TokenOutput]], None] = lambda begun: None
        """Hears, before a step runs, which requests are computed in it for the first time."""
        parts.start()

    # ------------------------------------------------------------------ requests

    def refuse(self, request: Request) -> RequestRefused | None:
        """Why this request cannot be taken, before any work is done."""
        return self.parts.admission.refuse(request)

    def add(self, request: Request) -> None:
        request.kv_dtype = self.parts.rank.shape.kv_name
        self.scheduler.add(request)

    def receive(self, request: Request, handover_id: str) -> bool:
        """Go on with a request that another instance has handed over, in some step; False: it has not, to this one."""
        return self.parts.receiver.receive(request, handover_id)

    def take_final_notices(self) -> list[HandedOver | RequestRefused]:
        """Requests that go on elsewhere, or nowhere, since the last time."""
        given_up = [*self.take_failed(), *self.parts.unplaceable.give_up()]
        return [*self.parts.drain.take_final_notices(), *given_up]

    def take_failed(self) -> list[RequestRefused]:
        """Requests that ended since the last time because no token could be computed for them, here or elsewhere."""
        failed, self._failed = self._failed, []
        return failed

    def drain(self, within_s: float) -> None:
        """Take nothing new and give back what is lent; `is_drained` says when it may end."""
        self.parts.drain.begin(within_s)

    def stay(self) -> None:
        """After all: end the drain, and take requests again."""
        self.parts.drain.cancel()

    @property
    def is_idle(self) -> bool:
        """No request runs, waits or arrives."""
        return self.parts.is_idle

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self.parts.drain.is_under_way or not self.is_idle

    @property
    def is_alone(self) -> bool:
        """Whether it never borrows."""
        return self.parts.is_lonely or not self.config.lending.enabled

    @property
    def is_drained(self) -> bool:
        return self.parts.drain.is_over

    def abort(self, request_id: str) -> None:
        request = self.scheduler.find(request_id)
        if request is not None:
            self.scheduler.finish(request, FinishReason.ABORT)
        else:
            self.parts.receiver.abort(request_id)

    def give_up_all(self) -> list[TokenOutput]:
        """This instance ends before its requests: its part of each, for those who go on with them."""
        return [*self.scheduler.give_up_all(), *self.parts.receiver.give_up_all()]

    # ------------------------------------------------------------------ a step

    def step(self) -> list[TokenOutput]:
        """Compute the next tokens of the running requests; returns what came out."""
        self.parts.fatal.raise_if_any()
        self._follow_orders()
        self.parts.receiver.begin_step()
        self.parts.drain.begin_step()
        scheduled = self.scheduler.schedule()
        self._tell_begun(scheduled)
        plan = self._plan(scheduled)
        began_s = self.parts.clock.monotonic_s()
        result = self._run(plan)
        sampled = self._sample(scheduled, result)  # before anything counts as lost: the plan's logit rows count on it
        self.scheduler.charge_wait(scheduled, result.waited_s)
        self.rmanager.note_step(self.parts.clock.monotonic_s() - began_s, result.held_back_s)
        spoiled = self._lose_creditors(result)
        self.rmanager.end_step()
        done = [item for item in scheduled if item.request not in spoiled]
        failed = self._end_those_without_a_token([x.request for x in done if x.needs_logits], sampled)
        outputs = self.scheduler.update([item for item in done if item.request not in failed], sampled)
        self.parts.drain.end_step(result.lost)
        self.parts.reporting.update()
        return outputs

    def _tell_begun(self, scheduled: list[Scheduled]) -> None:
        """If this instance dies of one of them, nobody else must."""
        begun = [item.request for item in scheduled if not item.request.is_begun]
        for request in begun:
            request.is_begun = True
        if begun:
            self.when_begun([TokenOutput(request.request_id, []) for request in begun])

    def _plan(self, scheduled: list[Scheduled]) -> StepPlan:
        token_ids: list[int] = []
        slices: list[Slice] = []
        creditors: dict[str, Peer] = {}
        for item in scheduled:
            request = item.request
            start = request.next_range.start
            end = start + item.num_tokens
            token_ids.extend(request.token_ids(start, end))
            spans, open_slot = self.rmanager.spans_before(request, end), self.rmanager.open_slot(request)
            slices.append(Slice(request.request_id, start, end, spans, item.needs_logits, open_slot))
            creditors.update({x.creditor: x.peer for x in self.parts.loans.of(RequestOwner(request.request_id))})
        return StepPlan(
            self.parts.reporting.num_steps,
            token_ids,
            slices,
            *self.rmanager.take_moves(),
            self.parts.drain.plan(),
            list(creditors.values()),
        )

    def _run(self, plan: StepPlan) -> StepResult:
        if not (plan.token_ids or plan.moves or plan.pulls or plan.pushes):
            self.parts.clock.sleep(0 if self.is_idle else NO_ROOM_PAUSE_S)
            return StepResult(None, {})
        self.parts.reporting.num_steps += 1
        self.parts.reporting.num_computed_tokens += len(plan.token_ids)
        if self.parts.followers is None:
            return self.parts.rank.runner.run(plan)
        self.parts.followers.begin_step(plan)
        result = self.parts.rank.runner.run(plan)
        theirs = self.parts.followers.end_step()
        return result._replace(lost={**result.lost, **theirs.lost}, wrong=result.wrong.union(theirs.wrong))

    def _sample(self, scheduled: list[Scheduled], result: StepResult) -> dict[str, SampledToken]:
        """Of those whose logits are finite."""
        wanted = [item.request for item in scheduled if item.needs_logits]
        if result.logits_RV is None or not wanted:
            return {}
        tokens = sample(result.logits_RV, wanted)
        return {request.request_id: x for request, x in zip(wanted, tokens, strict=True) if x is not None}

    def _end_those_without_a_token(self, wanted: list[Request], sampled: dict[str, SampledToken]) -> list[Request]:
        """Their logits are NaN or infinite: nobody else's business, and no other instance would compute better ones."""
        failed = [request for request in wanted if request.request_id not in sampled]
        for request in failed:
            sentence = (
                f"the model's logits after {request.num_tokens} tokens of this request are not finite (NaN or "
                "infinite): no token can be drawn from them; look at the checkpoint, or serve it in fp32"
            )
            logger.warning("%s is given up: %s", request.request_id, sentence)
            self.scheduler.let_go(request)
            self._failed.append(RequestRefused(request.request_id, "bad_logits", sentence))
        return failed

    def _lose_creditors(self, result: StepResult) -> list[Request]:
        """What lay at lost creditors is computed again; returns the requests whose tokens of this step mean nothing.

        Their clients see a pause, and the same tokens.
        """
        spoiled: list[Request] = []
        for creditor, reason in result.lost.items():
            self.parts.rank.peers.give_up(
                creditor, DISTRUST_S if creditor in result.wrong else self.config.ledger.lease_s
            )
            requests = self.rmanager.lose_creditor(creditor)
            num_tokens = sum(request.num_lost_tokens for request in requests)
            what = f"{len(requests)} requests compute {num_tokens} tokens again"
            logger.warning("lost creditor %s (%s): %s", creditor, reason, what)
            spoiled += requests
        return spoiled

    def _follow_orders(self) -> None:
        while not self.parts.membership.orders.empty():
            order = self.parts.membership.orders.get()
            if isinstance(order, MoveOrder):
                self.rmanager.move_to(order.request_id, order.num_rblocks, order.destination)
            else:
                self.rmanager.recall(order.key)

    # ------------------------------------------------------------------ the pool

    def status(self, query_id: int) -> InstanceStatus:
        return self.parts.reporting.status(query_id)

    def check_integrity(self) -> None:
        with self.parts.receiver.held() as incoming:
            self.rmanager.check_integrity(incoming.block_ids, incoming.handover_ids)

    def note_idle(self) -> None:
        """Let the next heartbeat say that nothing runs, and what is kept for requests of others.

        Raises what ends this instance: that another has come under its name, or that one of its threads has failed.
        """
        self.parts.fatal.raise_if_any()
        self.parts.loans.take_results()
        self.parts.receiver.begin_step()
        self.parts.reporting.update()

    def close(self) -> None:
        """Give back what is borrowed, leave the ledger, stop the followers, remove the sockets."""
        parts = self.parts
        close_in_order(
            [
                parts.link_probes.stop,
                parts.pool_looks.stop,
                parts.heartbeat.stop,
                self._finish_all,
                lambda: parts.loans.flush(RETURN_WITHIN_S),
                *([parts.host_lender.close] if parts.host_lender is not None else []),
                parts.membership.leave,
                parts.listeners.close,
                *([parts.followers.stop] if parts.followers is not None else []),
                lambda: parts.jobs.shutdown(wait=False, cancel_futures=True),
                parts.control.close,
                parts.rank.peers.close,
                parts.ledger.close,
            ]
        )

    def _finish_all(self) -> None:
        for request in [*self.scheduler.running, *self.scheduler.waiting]:
            self.scheduler.finish(request, FinishReason.ABORT)
