"""One serving instance: the composition root, and the loop that is the architecture."""

import json
import time

import torch.distributed as dist

from megatron_distkv.config.instance import LONELY_LEDGER, InstanceConfig
from megatron_distkv.engine.addresses import rank_address, request_socket
from megatron_distkv.engine.batch import Slice, StepPlan
from megatron_distkv.engine.closing import close_in_order
from megatron_distkv.engine.doors import Doors, advertised_address, warn_of_open_doors
from megatron_distkv.engine.followers import FollowerRanks
from megatron_distkv.engine.instance_secret import share_instance_secret
from megatron_distkv.engine.lender_desk import LenderDesk
from megatron_distkv.engine.membership import Membership
from megatron_distkv.engine.model_runner import StepResult
from megatron_distkv.engine.rank import Rank
from megatron_distkv.engine.sampler import SampledToken, sample
from megatron_distkv.engine.scheduler import Scheduled, Scheduler
from megatron_distkv.kvcache.rblock_allocator import RBlockAllocator
from megatron_distkv.ledger import (
    HOST_RBLOCKS,
    WAYS,
    DebtLedger,
    InstanceReport,
    InstanceState,
    Move,
    RequestPlacementEntry,
    write_ways,
)
from megatron_distkv.log import get_logger
from megatron_distkv.messages import InstanceStatus, RequestRefused, TokenOutput
from megatron_distkv.request import FinishReason, Request
from megatron_distkv.rmanager import (
    Borrowing,
    Heartbeat,
    LateReleases,
    Lending,
    NoFollowers,
    PoolOutlook,
    RManager,
    Ways,
)

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
        cache, lending = config.kv_cache, config.lending
        max_lent = int(cache.num_rblocks * lending.lendable_fraction) if lending.enabled else 0
        self._allocator = RBlockAllocator(cache.num_rblocks, max_lent)
        self._membership = self._make_membership(ledger)
        if config.ledger.url != LONELY_LEDGER:
            warn_of_open_doors(config.network, rank.secret, config.ledger.pool)
        self._followers = self._connect_followers()
        self._ways = Ways(
            ledger,
            rank.identity,
            rank.shape,
            rank.peers.dial,
            lambda ways: self._membership.describe(**{WAYS: write_ways(ways)}),
            lending.deadline_s,
        )
        outlook = PoolOutlook(ledger, rank.identity, rank.peers, enabled=lending.enabled, ways=self._ways)
        late_releases = LateReleases(ledger, rank.identity)
        self._borrowing = Borrowing(ledger, rank.identity, rank.peers, outlook, late_releases, lending.deadline_s)
        self._lending = Lending(
            self._allocator,
            ledger,
            rank.identity,
            rank.loan_table,
            self._followers or NoFollowers(),
            in_debt=lambda: self._borrowing.num_borrowed > 0,
        )
        self._host = RBlockAllocator(cache.num_host_rblocks, max_lent=0)
        self.rmanager = RManager(self._allocator, self._host, self._borrowing, outlook, lending, cache.rblock_size)
        self.scheduler = Scheduler(config.scheduler, self.rmanager)
        self._desk = LenderDesk(self._lending, rank.creditor)
        self._doors = Doors(
            config.network,
            rank_address(config.run_dir, config.instance_id, 0),
            0,
            config.ledger.pool,
            self._desk.answer,
            secret=rank.secret,
            on_disconnect=rank.creditor.forget,
        )
        self._heartbeat = Heartbeat(
            ledger,
            rank.identity,
            config.ledger,
            self._lending,
            late_releases,
            self._membership.join,
            lambda: self._report,
        )
        self._drained_by_s: float | None = None
        self.num_steps = 0
        self.num_computed_tokens = 0
        self._report = InstanceReport(0)
        self._membership.join()
        self._heartbeat.start()
        if lending.enabled and config.ledger.url != LONELY_LEDGER:
            self._ways.start()

    # ------------------------------------------------------------------ requests

    def refuse(self, request: Request) -> RequestRefused | None:
        """Why this request cannot be taken, before any work is done."""
        longest = self.rmanager.longest_context_tokens()
        if self.model.max_context_tokens is not None:
            longest = min(longest, self.model.max_context_tokens)
        if request.max_total_tokens > longest:
            return RequestRefused(
                request.request_id,
                "too_long",
                f"prompt ({len(request.prompt_token_ids)} tokens) and max_tokens ({request.sampling.max_tokens}) need "
                f"a context of {request.max_total_tokens} tokens; the longest that fits now is {longest}",
            )
        if any(not 0 <= token < self.model.vocab_size for token in request.prompt_token_ids):
            sentence = f"a token id of the prompt is outside of the vocabulary of {self.model.vocab_size}"
            return RequestRefused(request.request_id, "bad_request", sentence)
        if self.scheduler.find(request.request_id) is not None:
            return RequestRefused(request.request_id, "bad_request", "a request of this id is not finished yet")
        if not request.prompt_token_ids:
            return RequestRefused(request.request_id, "bad_request", "the prompt is empty: it needs at least one token")
        if self._drained_by_s is not None:
            return RequestRefused(request.request_id, "draining", "this instance is about to leave")
        if self.scheduler.is_full:
            sentence = f"{len(self.scheduler.waiting)} requests wait already; try again later"
            return RequestRefused(request.request_id, "queue_full", sentence)
        return None

    def add(self, request: Request) -> None:
        self.scheduler.add(request)

    def drain(self, within_s: float) -> None:
        """Take nothing new and give back what is lent; `is_drained` says when it may end."""
        self._drained_by_s = time.monotonic() + within_s
        self._lending.draining = True
        self._update_report()

    @property
    def is_drained(self) -> bool:
        """Nothing runs and nothing is lent, or the time for that is over: gateways go on elsewhere."""
        if self._drained_by_s is None:
            return False
        self.rmanager.reclaim_all()
        is_empty = self.scheduler.is_idle and self._allocator.num_lent == 0
        return is_empty or time.monotonic() > self._drained_by_s

    def abort(self, request_id: str) -> None:
        request = self.scheduler.find(request_id)
        if request is not None:
            self.scheduler.finish(request, FinishReason.ABORT)

    # ------------------------------------------------------------------ a step

    def step(self) -> list[TokenOutput]:
        """Compute the next tokens of the running requests; returns what came out."""
        self._raise_if_superseded()
        self._follow_orders()
        scheduled = self.scheduler.schedule()
        plan = self._plan(scheduled)
        result = self._run(plan)
        sampled = self._sample(scheduled, result)  # before anything counts as lost: the plan's logit rows count on it
        self.scheduler.charge_wait(scheduled, result.waited_s)
        spoiled = self._lose_creditors(result)
        self.rmanager.end_step()
        outputs = self.scheduler.update([item for item in scheduled if item.request not in spoiled], sampled)
        self._update_report()
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
            slices.append(Slice(start, end, self.rmanager.spans_before(request, end), item.needs_logits))
            creditors.update({x.creditor: x.address for x in self._borrowing.loans_of(request.request_id)})
        return StepPlan(self.num_steps, token_ids, slices, *self.rmanager.take_moves(), creditors)

    def _run(self, plan: StepPlan) -> StepResult:
        if not plan.token_ids and not plan.moves and not plan.pulls:
            time.sleep(0 if self.scheduler.is_idle else NO_ROOM_PAUSE_S)
            return StepResult(None, {})
        self.num_steps += 1
        self.num_computed_tokens += len(plan.token_ids)
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

    def _connect_followers(self) -> FollowerRanks | None:
        if self._rank.parallel.size == 1:
            return None
        secret = share_instance_secret()
        dist.barrier()  # the followers listen before this
        config, rank = self.config, self._rank
        return FollowerRanks(config.run_dir, rank.identity.instance, config.ledger.pool, rank.parallel.size, secret)

    def _make_membership(self, ledger: DebtLedger) -> Membership:
        config, rank = self.config, self._rank
        info = {
            "requests": str(request_socket(config.run_dir, config.instance_id)),
            "rblock_size": str(config.kv_cache.rblock_size),
            **rank.costs,
            HOST_RBLOCKS: str(config.kv_cache.num_host_rblocks),
            "tensor_parallel": str(config.tensor_parallel),
            "model": str(config.model.resolve()),
            "vocab_size": str(self.model.vocab_size),
            "eos_token_ids": json.dumps(self.model.eos_token_ids),
        }
        address = advertised_address(config.network, config.run_dir, config.instance_id, rank.parallel.size)
        return Membership(ledger, rank.identity, config.ledger, address, self._allocator, rank.shape, info)

    def _raise_if_superseded(self) -> None:
        if self._heartbeat.superseded is not None:
            raise self._heartbeat.superseded

    def _update_report(self) -> None:
        scheduler = self.scheduler
        self._report = InstanceReport(
            local_used_rblocks=self._allocator.num_used,
            state=InstanceState.UP if self._drained_by_s is None else InstanceState.DRAINING,
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            max_request_tokens=max((request.num_computed_tokens for request in scheduler.running), default=0),
            placements=tuple(entry for request in scheduler.running for entry in self._placements(request)),
        )

    def _placements(self, request: Request) -> list[RequestPlacementEntry]:
        table, me = self.rmanager.table(request), self._rank.identity.instance
        lent = [RequestPlacementEntry(request.request_id, x, n, False) for x, n in table.remote_by_creditor().items()]
        return [RequestPlacementEntry(request.request_id, me, table.num_local, True), *lent]

    def status(self, query_id: int) -> InstanceStatus:
        return InstanceStatus(
            query_id=query_id,
            instance_id=self.config.instance_id,
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting),
            free_rblocks=self._allocator.num_free,
            used_rblocks=self._allocator.num_used,
            lent_rblocks=self._allocator.num_lent,
            borrowed_rblocks=self._borrowing.num_borrowed,
            used_host_rblocks=self._host.num_used,
            num_steps=self.num_steps,
            num_preemptions=self.scheduler.num_preemptions,
            num_computed_tokens=self.num_computed_tokens,
        )

    def check_integrity(self) -> None:
        self.rmanager.check_integrity()

    def note_idle(self) -> None:
        """Let the next heartbeat say that nothing runs."""
        self._update_report()

    def close(self) -> None:
        """Give back what is borrowed, leave the ledger, stop the followers, remove the sockets."""
        close_in_order(
            [
                self._ways.stop,
                self._heartbeat.stop,
                self._finish_all,
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
