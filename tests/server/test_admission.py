"""Who may start when the pool is full: nothing before there is room, nobody starves, and all waiting is bounded."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from megatron_distkv.clock import SystemClock
from megatron_distkv.config.admission import AdmissionConfig
from megatron_distkv.metrics import REGISTRY
from megatron_distkv.sampling_params import SamplingParams
from megatron_distkv.server.admission import Admission
from megatron_distkv.server.attempt import DOUBT_S, Attempt
from megatron_distkv.server.errors import ApiError, from_refusal
from megatron_distkv.server.placement import placed
from tests.server.still_view import RBLOCK_SIZE, StillView, member
from tests.virtual_time.clock import VirtualClock


class Pool:
    """A gateway's admission over a picture of a pool."""

    def __init__(self, **config: Any) -> None:
        self.view = StillView()
        self.admission = Admission(AdmissionConfig(**{"overtake_within_s": 1000, **config}), self.view, SystemClock())

    def ask(self, num_rblocks: int, pinned: str | None = None, priority: int = 0) -> "Visitor":
        return Visitor(self, num_rblocks, pinned, priority)


class Visitor:
    """A request whose prompt and first token fill `num_rblocks`; it stays at its instance until it leaves."""

    def __init__(self, pool: Pool, num_rblocks: int, pinned: str | None, priority: int) -> None:
        self._pool = pool
        sampling = SamplingParams(max_tokens=2, priority=priority)
        self.attempt = Attempt([1] * (num_rblocks * RBLOCK_SIZE - 1), sampling, pinned, SystemClock())
        self.at: str | None = None
        self._may_leave = asyncio.Event()
        self.task = asyncio.create_task(self._visit())

    async def _visit(self) -> None:
        self._pool.admission.require_possible(self.attempt)
        async with placed(self.attempt, self._pool.admission) as record:
            self.at = record.instance
            self.attempt.request(record)
            await self._may_leave.wait()

    async def leave(self) -> None:
        self._may_leave.set()
        await self.task

    async def refused(self) -> ApiError:
        with pytest.raises(ApiError) as caught:
            await self.task
        return caught.value


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def play(story: Callable[[], Awaitable[None]]) -> None:
    async def with_end() -> None:
        await asyncio.wait_for(story(), 20)
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    asyncio.run(with_end())


def test_what_can_never_fit_is_refused_at_once() -> None:
    async def story() -> None:
        # Given two instances, a lender and host memory, all of it in use
        pool = Pool()
        pool.view.show(
            member("a", 4, 4, host_rblocks=3), member("b", 5, 5, reserved=1), member("l", 8, 8, role="lender")
        )
        # When a request comes that the empty pool could hold, and one that it could not: 4 + 3 + 4 + 8 rBlocks
        fitting, too_long = pool.ask(19), pool.ask(20)
        await settle()
        # Then the one waits, and the other hears how long it may be
        assert fitting.at is None
        error = await too_long.refused()
        assert (error.status, error.code) == (400, "context_length_exceeded")
        needs, holds = f"need a context of {20 * RBLOCK_SIZE} tokens", f"memory holds now is {19 * RBLOCK_SIZE}"
        assert needs in str(error)
        assert holds in str(error)
        # And not longer than the model can attend to
        pool.view.show(member("a", 400, max_context_tokens=20))
        pool = Pool()
        pool.view.show(member("a", 400, max_context_tokens=20))
        assert "this model attends to 20 tokens at most" in str(await pool.ask(3).refused())

    play(story)


def test_it_waits_for_room_in_the_whole_pool() -> None:
    async def story() -> None:
        # Given two instances with 3 free rBlocks each
        pool = Pool()
        pool.view.show(member("a", 8, 5), member("b", 8, 5))
        # When one that needs 5 comes, then it starts, over both; another such waits, as only one is left
        first = pool.ask(5)
        second = pool.ask(5)
        await settle()
        assert first.at is not None
        assert second.at is None
        # Also when the picture shows that the first holds what it was promised
        pool.view.show(member("a", 8, 8), member("b", 8, 7), held={first.at: {first.attempt.request_id: 5}})
        await settle()
        assert second.at is None
        # And it starts when there is room, which is not promised twice
        third = pool.ask(5)
        await first.leave()
        pool.view.show(member("a", 8, 5), member("b", 8, 5))
        await settle()
        assert second.at is not None
        assert third.at is None

    play(story)


def test_an_instance_in_debt_lends_nothing() -> None:
    async def story() -> None:
        pool = Pool()
        pool.view.show(member("a", 8, 5), member("b", 8, 5, borrowed=1))
        visitor = pool.ask(6, pinned="a")
        await settle()
        assert visitor.at is None
        pool.view.show(member("a", 8, 5), member("b", 8, 5))
        await settle()
        assert visitor.at == "a"

    play(story)


@pytest.mark.parametrize(("overtake_within_s", "overtakes"), [(1000, True), (0, False)])
def test_short_ones_overtake_a_long_one_for_a_while_only(overtake_within_s: float, overtakes: bool) -> None:
    async def story() -> None:
        # Given a pool with a little room, and a long request that waits for more
        pool = Pool(overtake_within_s=overtake_within_s)
        pool.view.show(member("a", 8, 6), member("b", 8, 8))
        long = pool.ask(9)
        # When a short one comes that would fit
        short = pool.ask(2)
        await settle()
        # Then it starts only while the long one has not waited for long
        assert long.at is None
        assert (short.at is not None) == overtakes
        # And the room that gathers is the long one's
        await (short.leave() if overtakes else settle())
        pool.view.show(member("a", 8, 0), member("b", 8, 5))
        await settle()
        assert long.at == "a"

    play(story)


def test_while_memory_gathers_only_a_few_much_shorter_ones_pass() -> None:
    async def story() -> None:
        # Given a long request that memory gathers for
        pool = Pool(overtake_within_s=0)
        pool.view.show(member("a", 64, 4), member("b", 64, 64))
        long = pool.ask(80)
        # When one that is not much shorter comes, and many that are
        other, short = pool.ask(12), [pool.ask(8) for _ in range(7)]
        await settle()
        # Then half of its size passes, with room for more
        assert (long.at, other.at) == (None, None)
        assert [visitor.at for visitor in short] == ["a"] * 5 + [None] * 2
        # And those that leave make no room for others to pass
        for visitor in short[:5]:
            await visitor.leave()
        await settle()
        assert [visitor.at for visitor in short[5:]] == [None] * 2
        # When memory has gathered, it starts
        pool.view.show(member("a", 64, 0), member("b", 64, 40))
        await settle()
        assert long.at == "a"

    play(story)


def test_important_ones_come_first() -> None:
    async def story() -> None:
        pool = Pool()
        pool.view.show(member("a", 8, 8))
        older, important = pool.ask(4), pool.ask(4, priority=-1)
        await settle()
        pool.view.show(member("a", 8, 4))
        await settle()
        assert (older.at, important.at) == (None, "a")

    play(story)


def test_one_that_the_pool_cannot_hold_now_blocks_nobody() -> None:
    async def story() -> None:
        # Given a request that fitted until an instance went away
        pool = Pool(overtake_within_s=0)
        pool.view.show(member("a", 8), member("b", 8))
        pool.view.show(member("a", 8))
        long = pool.ask(12)
        short = pool.ask(2)
        await settle()
        # Then others go on, and it waits for the instance
        assert (long.at, short.at) == (None, "a")
        pool.view.show(member("a", 8), member("b", 8, epoch=2))
        await settle()
        assert long.at is not None

    play(story)


def test_one_that_waits_for_its_instance_blocks_only_that() -> None:
    async def story() -> None:
        pool = Pool(overtake_within_s=0)
        # Given one that waits for all of an instance, and others that nobody lends
        pool.view.show(member("a", 8, 8), member("b", 8, reserved=8))
        pinned, other = pool.ask(8, pinned="a"), pool.ask(2)
        await settle()
        assert (pinned.at, other.at) == (None, "b")
        # When its instance has some room, then that is not for others
        pool.view.show(member("a", 8, 2, reserved=8), member("b", 8, 8, reserved=8))
        third = pool.ask(2)
        await settle()
        assert (pinned.at, third.at) == (None, None)

    play(story)


def test_after_a_while_an_instance_claims_what_it_has_lent() -> None:
    async def story(overtake_within_s: float, starts: bool) -> None:
        pool = Pool(overtake_within_s=overtake_within_s)
        pool.view.show(member("a", 8, 0, lent=7), member("b", 8, 8, borrowed=7))
        visitor = pool.ask(4)
        await settle()
        assert (visitor.at == "a") == starts

    play(lambda: story(1000, False))
    play(lambda: story(0, True))


def test_the_queue_is_bounded_in_number() -> None:
    async def story() -> None:
        # Given a full pool whose queue moves: two have left it
        pool = Pool(max_queued_requests=2)
        pool.view.show(member("a", 8))
        for visitor in (pool.ask(1), pool.ask(1)):
            await settle()
            await visitor.leave()
        before = REGISTRY.get_sample_value("distkv_refused_requests_total", {"reason": "queue_full"}) or 0
        pool.view.show(member("a", 8, 8))
        # When three come, then two wait and the third hears when to come again
        waiting = [pool.ask(1), pool.ask(1)]
        error = await pool.ask(1).refused()
        assert (error.status, error.code, error.kind) == (429, "queue_full", "rate_limit_error")
        assert error.retry_after_s is not None
        assert 1 <= error.retry_after_s <= 60
        assert not any(visitor.task.done() for visitor in waiting)
        assert REGISTRY.get_sample_value("distkv_queued_requests") == 2
        assert REGISTRY.get_sample_value("distkv_refused_requests_total", {"reason": "queue_full"}) == before + 1

    play(story)


def test_the_queue_is_bounded_in_time() -> None:
    async def story() -> None:
        pool = Pool(max_queue_wait_s=0.2)
        pool.view.show(member("a", 8, 8))
        error = await pool.ask(1).refused()
        assert (error.status, error.code) == (429, "queue_timeout")
        assert "no memory became free within 0.2 s; try again in 60 s" in str(error)
        assert REGISTRY.get_sample_value("distkv_queued_requests") == 0

    play(story)


def test_one_that_leaves_the_queue_leaves_nothing_behind() -> None:
    async def story() -> None:
        # Given one that waits before another, which nobody overtakes
        pool = Pool(overtake_within_s=0)
        pool.view.show(member("a", 8, 6))
        gone, other = pool.ask(4), pool.ask(2)
        await settle()
        assert other.at is None
        # When its client leaves, then the other starts, and all of the room can be had later
        gone.task.cancel()
        await settle()
        assert other.at == "a"
        await other.leave()
        pool.view.show(member("a", 8))
        all_of_it = pool.ask(8)
        await settle()
        assert all_of_it.at == "a"

    play(story)


def test_whom_an_instance_refuses_waits_again_at_its_place() -> None:
    async def story() -> None:
        # Given an instance that is fuller than the gateway's picture shows: another gateway's requests
        pool = Pool()
        pool.view.show(member("a", 8))
        attempt = Attempt([1] * 10, SamplingParams(max_tokens=2), None, SystemClock())
        async with placed(attempt, pool.admission) as record:
            attempt.note_refused(record, from_refusal("queue_full", "all full"))

        # When it refuses, then the request is not lost: it waits, before younger ones, and asks again
        async def place() -> str:
            async with placed(attempt, pool.admission) as record:
                return record.instance

        again = asyncio.create_task(place())
        younger = pool.ask(8)
        await settle()
        assert not again.done()
        await younger.leave()
        pool.view.tell()
        assert await again == "a"

    play(story)


def test_too_long_for_an_instance_is_believed_when_it_is_said_again() -> None:
    too_long = from_refusal("too_long", "the longest that the pool's memory holds now is 3")
    clock = VirtualClock()
    attempt = Attempt([1] * 10, SamplingParams(max_tokens=2), None, clock)
    attempt.note_refused(member("a", 8), too_long)
    attempt.note_refused(member("a", 8), too_long)
    clock.now_s += 2 * DOUBT_S
    with pytest.raises(ApiError, match="memory holds now is 3"):
        attempt.note_refused(member("a", 8), too_long)


def test_without_a_ledger_instances_decide() -> None:
    async def story() -> None:
        # Given a full pool, and then no ledger any more
        pool = Pool()
        pool.view.show(member("a", 8, 8))
        visitor = pool.ask(1)
        await settle()
        assert visitor.at is None
        pool.view.lose_ledger()
        await settle()
        # Then who waits is sent to an instance, which has a queue of its own
        assert visitor.at == "a"

    play(story)


def test_an_instance_of_another_host_lends_but_is_asked_nothing() -> None:
    async def story() -> None:
        pool = Pool(max_queue_wait_s=0.2)
        pool.view.show(member("near", 8), member("far", 64, address="unix:/run/far.sock host:another tcp://far:7000"))
        # Given a gateway whose host has the smaller instance, then that one takes what needs the other's memory
        visitors = [pool.ask(6), pool.ask(12)]
        await settle()
        assert [visitor.at for visitor in visitors] == ["near", "near"]
        # And who wants the far one hears that no gateway here reaches it
        assert (await pool.ask(1, pinned="far").refused()).status == 400
        for visitor in visitors:
            await visitor.leave()

    play(story)


def test_a_pool_without_instances() -> None:
    async def story() -> None:
        pool = Pool(max_queue_wait_s=0.2)
        pool.view.show()
        assert (await pool.ask(1).refused()).code == "no_instance"
        # Where there was one a moment ago, it may be about to come back
        pool.view.show(member("a", 8))
        pool.view.show()
        waiting = pool.ask(1)
        await settle()
        assert not waiting.task.done()
        assert (await waiting.refused()).code == "no_instance"
        assert "no live instance is called 'b'" in str(await pool.ask(1, pinned="b").refused())

    play(story)
