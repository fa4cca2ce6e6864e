"""The very parts that serve, driven in virtual time: what they wait for happens when their clock says so."""

import asyncio

import pytest

from megatron_distkv.config.admission import AdmissionConfig
from megatron_distkv.engine.unplaceable import NO_PROGRESS_S
from megatron_distkv.pool import COOLDOWN_S
from megatron_distkv.rblock import LoanId
from megatron_distkv.request import Request
from megatron_distkv.sampling_params import SamplingParams
from megatron_distkv.server.admission import CLAIM_AFTER_S, Admission
from megatron_distkv.server.attempt import Attempt
from megatron_distkv.server.errors import ApiError
from megatron_distkv.server.placement import placed
from megatron_distkv.server.pool_looks import REFRESH_INTERVAL_S
from megatron_distkv.server.pool_view import GatewayView
from tests.virtual_time.loop import run
from tests.virtual_time.pool import SHAPE, STEP_S, VirtualPool

SIZE = SHAPE.rblock_size


def test_a_creditor_that_recalls_is_left_alone_for_its_cooldown() -> None:
    # Given a request that has outgrown its instance, on memory of another
    pool = VirtualPool(a=8, b=64)
    pool["a"].add("long", 20 * SIZE, 200)
    pool.run(lambda: pool["a"].loans.num_borrowed > 12)
    # When that one wants all of it back
    pool["b"].lending.ask_back(pool["b"].allocator.num_lent)
    recalled_s = pool.run(lambda: pool["a"].cooldown.holds("b"))
    # Then it is asked for more when its cooldown is over, and not before
    again_s = pool.run(lambda: pool.lent_at_s[-1] > recalled_s)
    assert again_s - recalled_s == pytest.approx(COOLDOWN_S, abs=1.0)
    assert again_s - recalled_s >= COOLDOWN_S - STEP_S


def test_a_request_without_memory_is_given_up_when_its_time_is_over() -> None:
    # Given two instances that could hold a long request together, and one of them full of others' memory
    pool = VirtualPool(a=8, b=64)
    allocator = pool["b"].allocator
    assert allocator.lend(LoanId("of others"), allocator.max_lent) is not None
    began_s = pool.clock.now_s
    pool["a"].add("long", 20 * SIZE, 20)
    # When nobody gives any back, then its gateway hears so, at the time
    gave_up_s = pool.run(lambda: bool(pool["a"].refused))
    assert [x.code for x in pool["a"].refused] == ["no_progress"]
    assert gave_up_s - began_s == pytest.approx(NO_PROGRESS_S, abs=1.0)


def test_the_debts_of_a_dead_instance_end_with_its_lease() -> None:
    pool = VirtualPool(a=8, b=64)
    pool["a"].add("long", 20 * SIZE, 200)
    pool.run(lambda: pool["a"].loans.num_borrowed > 12)
    # When the debtor dies
    pool["a"].is_dead = True
    died_s = pool.clock.now_s
    # Then its creditor has its memory back when the lease is over, and a heartbeat later at most
    free_s = pool.run(lambda: pool["b"].allocator.num_lent == 0)
    lease_s, interval_s = pool["a"].config.lease_s, pool["a"].config.heartbeat_interval_s
    assert lease_s - interval_s <= free_s - died_s <= lease_s + 2 * interval_s


class Gateway:
    """A gateway's admission, over looks at the ledger of a pool that stands still but for its heartbeats."""

    def __init__(self, pool: VirtualPool, config: AdmissionConfig) -> None:
        self._pool = pool
        self._view = GatewayView(pool.ledger, pool.clock)
        self._admission = Admission(config, self._view, pool.clock)

    def ask(self, num_rblocks: int, pinned: str) -> float:
        """For how long it waits for an instance; raises ApiError."""
        return run(self._pool.clock, self._ask(num_rblocks, pinned))

    async def _ask(self, num_rblocks: int, pinned: str) -> float:
        looks = asyncio.create_task(self._keep_looking())
        await asyncio.sleep(0)
        came_s = self._pool.clock.now_s
        attempt = Attempt([5] * (num_rblocks * SIZE - 8), SamplingParams(max_tokens=8), pinned, self._pool.clock)
        try:
            async with placed(attempt, self._admission):
                return self._pool.clock.now_s - came_s
        finally:
            looks.cancel()

    async def _keep_looking(self) -> None:
        while True:
            for instance in self._pool.instances.values():
                instance.membership.beat()
            self._view.look()
            self._view.tell()
            await asyncio.sleep(REFRESH_INTERVAL_S)


def test_a_request_claims_what_its_instance_has_lent_after_a_while() -> None:
    # Given an instance that has lent half of its memory, and what is free is not enough
    pool = VirtualPool(a=64, b=8)
    pool["b"].add("long", 40 * SIZE, 200)
    pool.run(lambda: pool["a"].allocator.num_lent > 30)
    # Then a request that wants more there waits for that long, and not longer
    waited_s = Gateway(pool, AdmissionConfig(overtake_within_s=20.0)).ask(48, pinned="a")
    assert CLAIM_AFTER_S <= waited_s <= CLAIM_AFTER_S + 2 * REFRESH_INTERVAL_S


def test_a_request_leaves_the_queue_when_its_time_is_over() -> None:
    # Given an instance that is full for good
    pool = VirtualPool(a=64)
    pool["a"].add("others", 62 * SIZE, 20)
    pool.run(lambda: pool["a"].allocator.num_free <= 2)
    came_s = pool.clock.now_s
    # Then a request for it hears after its time in the queue that there is no room
    with pytest.raises(ApiError) as refused:
        Gateway(pool, AdmissionConfig(max_queue_wait_s=60.0)).ask(8, pinned="a")
    assert refused.value.code == "queue_timeout"
    assert pool.clock.now_s - came_s == pytest.approx(60.0)


def busy_minutes(seed: int) -> list[tuple[float, str, int]]:
    """Five minutes of two instances with requests drawn at random; when each ended, and how often it was preempted."""
    pool = VirtualPool(seed, a=24, b=48)
    draw, requests, end_s = pool.clock.random, list[Request](), pool.clock.now_s + 300.0
    ended: dict[str, tuple[float, str, int]] = {}

    def have_ended() -> bool:
        given_up = {x.request_id for instance in pool.instances.values() for x in instance.refused}
        for x in requests:
            if x.finish_reason is not None or x.request_id in given_up:
                ended.setdefault(x.request_id, (pool.clock.now_s, x.request_id, x.num_preemptions))
        return len(ended) == len(requests)

    while pool.clock.now_s < end_s:
        pool.run_for(draw.expovariate(0.8))
        new = (f"r{len(requests)}", draw.randrange(1, 20 * SIZE), draw.randrange(1, 100))
        requests.append(pool[draw.choice("ab")].add(*new))
        have_ended()
    pool.run(have_ended)
    # Nobody holds or owes anything
    pool.run_for(5.0)
    for instance in pool.instances.values():
        assert (instance.allocator.num_free, instance.loans.num_borrowed) == (instance.allocator.num_rblocks, 0)
    assert not pool.ledger.snapshot().loans
    assert pool.lent_at_s
    assert any(x.num_preemptions for x in requests)
    return list(ended.values())


def test_minutes_of_a_busy_pool_are_the_same_again_and_every_request_ends() -> None:
    first = busy_minutes(seed=1)
    assert len(first) > 150
    assert busy_minutes(seed=1) == first
    assert busy_minutes(seed=2) != first
