"""One serving instance: the composition root, and the loop that is the architecture."""

import json
import time

import torch.distributed as dist

from megatron_distkv.config.instance import LONELY_LEDGER, InstanceConfig
from megatron_distkv.engine.addresses import rank_address, request_socket
from megatron_distkv.engine.admission import Admission
from megatron_distkv.engine.adopting import Adopting
from megatron_distkv.engine.batch import Slice, StepPlan
from megatron_distkv.engine.closing import close_in_order
from megatron_distkv.engine.departure import Departure
from megatron_distkv.engine.doors import Doors, advertised_address, warn_of_open_doors
from megatron_distkv.engine.followers import FollowerRanks
from megatron_distkv.engine.handover import Handover
from megatron_distkv.engine.instance_secret import share_instance_secret
from megatron_distkv.engine.lender_desk import LenderDesk
from megatron_distkv.engine.membership import Membership
from megatron_distkv.engine.model_runner import StepResult
from megatron_distkv.engine.rank import Rank
from megatron_distkv.engine.reporting import Reporting
from megatron_distkv.engine.sampler import SampledToken, sample
from megatron_distkv.engine.scheduler import Scheduled, Scheduler
from megatron_distkv.kvcache.rblock_allocator import RBlockAllocator
from megatron_distkv.ledger import HOST_RBLOCKS, WAYS, DebtLedger, Move, WayCost, write_ways
from megatron_distkv.log import get_logger
from megatron_distkv.messages import HandedOver, InstanceStatus, RequestRefused, TokenOutput
from megatron_distkv.request import FinishReason, Request
from megatron_distkv.rmanager import (
    Adoptions,
    Borrowing,
    Heartbeat,
    LateReleases,
    Lending,
    NoFollowers,
    PoolOutlook,
    RManager,
    SuccessorDesk,
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
        self._allocator = RBlockAllocator(cache.num_rblocks, lending.max_lent(cache.num_rblocks))
        self._host = RBlockAllocator(cache.num_host_rblocks, max_lent=0)
        self._membership = self._make_membership(ledger)
        if config.ledger.url != LONELY_LEDGER:
            warn_of_open_doors(config.network, rank.secret, config.ledger.pool)
        self._followers = self._connect_followers()
        self._ways = self._make_ways()
        outlook = PoolOutlook(ledger, rank.identity, rank.peers, enabled=lending.enabled, ways=self._ways)
        late_releases = LateReleases(ledger, rank.identity)
        self._borrowing = Borrowing(ledger, rank.identity, rank.peers, outlook, late_releases, lending.deadline_s)
        self._lending = self._make_lending(ledger)
        self.rmanager = RManager(self._allocator, self._host, self._borrowing, outlook, lending, cache.rblock_size)
        self.scheduler = Scheduler(config.scheduler, self.rmanager)
        self._admission = Admission(self.model, self.scheduler, self.rmanager)
        self._reporting = self._make_reporting()
        self._adoptions = self._make_adoptions()
        self._adopting = self._make_adopting()
        self._departure = self._make_departure()
        self._doors = self._open_doors()
        self._heartbeat = self._make_heartbeat(late_releases)
        self._membership.join()
        self._heartbeat.start()
        if lending.enabled and config.ledger.url != LONELY_LEDGER:
            self._ways.start()

    # ------------------------------------------------------------------ requests

    def refuse(self, request: Request) -> RequestRefused | None:
        """Why this request cannot be taken, before any work is done."""
        return self._admission.refuse(request)

    def add(self, request: Request) -> None:
        self.scheduler.add(request)

    def adopt(self, request: Request, adoption_id: str) -> bool:
        """Go on with a request that another instance has handed over; False: it has not, to this one."""
        return self._adopting.adopt(request, adoption_id)

    def take_farewells(self) -> list[HandedOver]:
        """Requests that go on elsewhere since the last time."""
        return self._departure.take_farewells()

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
            slices.append(Slice(start, end, self.rmanager.spans_before(request, end), item.needs_logits))
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

    def _make_lending(self, ledger: DebtLedger) -> Lending:
        rank, followers = self._rank, self._followers or NoFollowers()
        return Lending(self._allocator, ledger, rank.identity, rank.loan_table, followers, in_debt=self._is_in_debt)

    def _is_in_debt(self) -> bool:
        return self._borrowing.num_borrowed > 0

    def _make_reporting(self) -> Reporting:
        me = self._rank.identity.instance
        return Reporting(me, self._allocator, self._host, self._borrowing, self.rmanager, self.scheduler)

    def _make_departure(self) -> Departure:
        desk = SuccessorDesk(self._rank.peers, self._rank.identity, self.config.lending.deadline_s)
        handover = Handover(
            self._ledger,
            self._rank.identity,
            desk,
            self._borrowing,
            self.rmanager,
            self.scheduler,
            self.config.lending.max_moved_rblocks_per_step,
        )
        return Departure(
            self._admission,
            self._reporting,
            self._lending,
            self.rmanager,
            self._allocator,
            self.scheduler,
            self._borrowing,
            self._adoptions,
            handover,
        )

    def _make_adoptions(self) -> Adoptions:
        followers, rblock_size = self._followers or NoFollowers(), self.config.kv_cache.rblock_size
        return Adoptions(self._allocator, self._rank.loan_table, followers, rblock_size)

    def _make_adopting(self) -> Adopting:
        return Adopting(
            self._adoptions,
            self._rank.identity,
            self._allocator,
            self._lending,
            self._borrowing,
            self.rmanager,
            self.scheduler,
        )

    def _open_doors(self) -> Doors:
        config, rank = self.config, self._rank
        return Doors(
            config.network,
            rank_address(config.run_dir, config.instance_id, 0),
            0,
            config.ledger.pool,
            LenderDesk(self._lending, rank.creditor, self._adoptions).answer,
            secret=rank.secret,
            on_disconnect=rank.creditor.forget,
        )

    def _make_ways(self) -> Ways:
        rank, config = self._rank, self.config
        return Ways(
            self._ledger, rank.identity, rank.shape, rank.peers.dial, self._publish_ways, config.lending.deadline_s
        )

    def _publish_ways(self, ways: dict[str, WayCost]) -> None:
        self._membership.describe(**{WAYS: write_ways(ways)})

    def _make_heartbeat(self, late_releases: LateReleases) -> Heartbeat:
        return Heartbeat(
            self._ledger,
            self._rank.identity,
            self.config.ledger,
            self._lending,
            late_releases,
            self._membership.join,
            lambda: self._reporting.report,
        )

    def _raise_if_superseded(self) -> None:
        if self._heartbeat.superseded is not None:
            raise self._heartbeat.superseded

    def status(self, query_id: int) -> InstanceStatus:
        return self._reporting.status(query_id)

    def check_integrity(self) -> None:
        with self._adoptions.held() as kept_for_others:
            self.rmanager.check_integrity(kept_for_others)

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
