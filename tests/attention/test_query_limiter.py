"""How much of a busy creditor's time its debtors get."""

import pytest

from megatron_distkv.attention.query_limiter import BURST_S, MAX_WAIT_S, STILL_BUSY_S, QueryLimiter
from tests.virtual_time.clock import VirtualClock


def answer(share: QueryLimiter, clock: VirtualClock, seconds: float) -> float:
    with share.turn() as throttled_s:
        clock.now_s += seconds
    return throttled_s


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


@pytest.mark.parametrize("bound", [0.1, 0.5, 0.9])
def test_queries_take_their_share_of_a_busy_creditors_time(bound: float, clock: VirtualClock) -> None:
    # Given a creditor that always computes, and a debtor that asks again at once
    share = QueryLimiter(bound, clock)
    began_s, answered_s, throttled_s = clock.now_s, 0.0, 0.0
    with share.own_work():
        for _ in range(500):
            throttled_s += answer(share, clock, 0.004)
            answered_s += 0.004
    # Then its queries got their share of the time, and the rest is what it was told
    elapsed_s = clock.now_s - began_s
    assert answered_s / elapsed_s == pytest.approx(bound, rel=0.05)
    assert throttled_s == pytest.approx(elapsed_s - answered_s)


def test_an_idle_creditor_holds_nothing_back(clock: VirtualClock) -> None:
    share = QueryLimiter(0.1, clock)
    assert all(answer(share, clock, 0.01) == 0.0 for _ in range(100))
    # Between two steps it is not idle yet
    with share.own_work():
        pass
    assert answer(share, clock, 0.01) > 0
    clock.now_s += STILL_BUSY_S
    assert answer(share, clock, 0.01) == 0.0


def test_without_a_bound_nothing_waits(clock: VirtualClock) -> None:
    share = QueryLimiter(1.0, clock)
    with share.own_work():
        assert all(answer(share, clock, 1.0) == 0.0 for _ in range(10))


def test_no_query_waits_so_long_that_its_creditor_seems_lost(clock: VirtualClock) -> None:
    share = QueryLimiter(0.01, clock)
    with share.own_work():
        answer(share, clock, 10 * BURST_S)
        assert answer(share, clock, 1.0) <= MAX_WAIT_S + 1e-9
        assert answer(share, clock, 1.0) == pytest.approx(MAX_WAIT_S)
