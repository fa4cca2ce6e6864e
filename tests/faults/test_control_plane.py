"""Two gManagers at once, a flushed ledger, an empty one, a replica without the last writes, clocks that jump.

After each fault ledger, creditors' tables and debtors' spans are equal again within some heartbeats, while requests go
on; nothing is computed twice, because the loans themselves are held by the instances.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import redis

from megatron_distkv.gmanager import GManager
from megatron_distkv.ledger import DebtLedger
from megatron_distkv.ledger.opening import open_ledger
from megatron_distkv.ledger.redis_ledger import RedisLedger
from megatron_distkv.request import Request
from megatron_distkv.sampling_params import SamplingParams
from tests.invariants.test_pool_of_instances import (
    Driver,
    Pool,
    assert_soon,
    start_pool,
)

GREEDY = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)
INTERVAL_S = 0.05


class ServerClock:
    """The ledger server's clock, as all of the pool see it: right, but for `ahead_s`."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def open_ledger(self, url: str, pool: str) -> DebtLedger:
        return RedisLedger(url, pool, clock_ms=lambda: int((time.time() + self.ahead_s) * 1000))


CLOCK = ServerClock()


@pytest.fixture(scope="module")
def pool(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    with start_pool(llama, tmp_path_factory.mktemp("pool"), "auto", CLOCK.open_ledger) as pool:
        yield pool


def server_of(pool: Pool) -> redis.Redis:
    """As an operator reaches it."""
    return redis.Redis.from_url(pool.server.url, decode_responses=True)


def flush(pool: Pool) -> None:
    with server_of(pool) as server:
        server.flushall()


def restart_empty(pool: Pool) -> None:
    with server_of(pool) as server:
        replica = Path(server.config_get("dir")["dir"], server.config_get("dbfilename")["dbfilename"])
    pool.server.kill()
    replica.unlink(missing_ok=True)
    pool.server.start()


def save(pool: Pool) -> None:
    """What a replica has at this moment."""
    with server_of(pool) as server:
        server.save()


def fail_over(pool: Pool) -> None:
    """The server dies with all that it wrote since `save`; one with the old data takes its place."""
    pool.server.kill()
    pool.server.start()


def flush_and_fail_over(pool: Pool) -> None:
    flush(pool)
    fail_over(pool)


def jump_ahead(pool: Pool) -> None:
    CLOCK.ahead_s = 3600.0
    wait_for_reports(pool)


def jump_back(pool: Pool) -> None:
    CLOCK.ahead_s = -3600.0
    wait_for_reports(pool)


def wait_for_reports(pool: Pool) -> None:
    """Each instance has renewed its lease since the jump, which took up to a half of it; or it has begun another."""

    def leases_left_ms() -> list[int]:
        return [record.lease_left_ms for record in pool.ledger.snapshot().instances]

    assert_soon(lambda: min(leases_left_ms(), default=0) > 600, lambda: f"{leases_left_ms()}")


@pytest.fixture(autouse=True)
def the_right_time() -> Iterator[None]:
    yield
    CLOCK.ahead_s = 0.0


class Managers:
    """gManagers of one pool, each in its own thread and with its own connection."""

    def __init__(self, pool: Pool, count: int) -> None:
        self._stack = ExitStack()
        self._pool = pool
        self._stops: dict[str, tuple[threading.Event, threading.Thread]] = {}
        for number in range(count):
            ledger, name, stop = open_ledger(pool.server.url, "default"), f"manager-{number}", threading.Event()
            self._stack.callback(ledger.close)
            thread = threading.Thread(target=GManager(ledger, name, INTERVAL_S).run, args=(stop,))
            thread.start()
            self._stops[name] = stop, thread

    def leader(self) -> str:
        with server_of(self._pool) as server:
            return str(server.hget("{default}:leader", "candidate"))

    def stop(self, name: str) -> None:
        stop, thread = self._stops.pop(name)
        stop.set()
        thread.join()

    def __enter__(self) -> "Managers":
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self._stops):
            self.stop(name)
        self._stack.close()


def begin(pool: Pool, name: str, length: int) -> Request:
    """A request in the middle of its answer, with rBlocks at both other instances or one of them."""
    request = Request(f"{name}-{length}", [3 + (7 * i) % 120 for i in range(length)], GREEDY)
    instance = pool.instances[name]
    assert_soon(lambda: instance.refuse(request) is None, lambda: "refused")
    instance.add(request)
    while len(request.output_token_ids) < 3:
        instance.step()
    assert pool.debts_held_by_debtors()
    return request


def finish(pool: Pool, request: Request, name: str) -> None:
    while request.finish_reason is None:
        pool.instances[name].step()
    for instance in pool.instances.values():
        instance.note_idle()


@pytest.mark.parametrize("fault", [flush, restart_empty, fail_over, flush_and_fail_over, jump_ahead, jump_back])
def test_a_request_in_the_middle_never_notices(pool: Pool, fault: Callable[[Pool], None]) -> None:
    # Given a ledger whose replica saw the pool without any loan, and a request that has borrowed since
    pool.assert_accounts_settle()
    save(pool)
    request = begin(pool, "a", 200)
    pool.assert_accounts_settle()
    debts = pool.debts_held_by_debtors()

    # When the ledger loses what it knew
    fault(pool)
    for _ in range(3):
        pool.instances["a"].step()

    # Then the ledger hears of the loans from those who hold them
    assert_soon(lambda: pool.debts_in_ledger() == debts, lambda: f"{pool.debts_in_ledger()} instead of {debts}")
    pool.assert_accounts_settle()
    pool.assert_spans_are_granted()

    # And the request ends with its tokens, without computing anything twice
    finish(pool, request, "a")
    assert (request.num_preemptions, request.num_recomputed_tokens) == (0, 0)
    (expected,) = pool.enough.generate([request.prompt_token_ids], request.sampling)
    assert request.output_token_ids == expected.token_ids
    pool.assert_accounts_settle()
    pool.assert_nothing_is_owed()


def test_loans_that_only_the_old_replica_knows_are_forgotten(pool: Pool) -> None:
    # Given a replica that saw a loan, which has ended since, and another that began since
    first = begin(pool, "a", 200)
    pool.assert_accounts_settle()
    save(pool)
    finish(pool, first, "a")
    second = begin(pool, "b", 210)
    pool.assert_accounts_settle()
    debts = pool.debts_held_by_debtors()

    # When it takes over
    fail_over(pool)
    assert_soon(lambda: pool.debts_in_ledger() == debts, lambda: f"{pool.debts_in_ledger()} instead of {debts}")
    finish(pool, second, "b")
    assert second.num_recomputed_tokens == 0
    pool.assert_accounts_settle()
    pool.assert_nothing_is_owed()


def test_of_two_gmanagers_one_leads_and_the_other_takes_over(pool: Pool) -> None:
    with Managers(pool, 2) as managers:
        # Given two at once, of which one leads, and plans that no other may publish
        request = begin(pool, "a", 200)
        assert_soon(lambda: managers.leader() in ("manager-0", "manager-1"), lambda: "nobody leads")
        leader = managers.leader()
        (other,) = {"manager-0", "manager-1"} - {leader}
        assert not pool.ledger.publish_moves(other, [])

        # When it ends, then the other leads, and again when the ledger has lost who led
        managers.stop(leader)
        assert_soon(lambda: managers.leader() == other, lambda: f"{managers.leader()} still leads")
        flush(pool)
        assert_soon(lambda: managers.leader() == other, lambda: "nobody leads an empty ledger")
        finish(pool, request, "a")
    pool.assert_accounts_settle()
    pool.assert_nothing_is_owed()


class FaultyDriver(Driver):
    """Also spoils the ledger under the requests."""

    def flush(self) -> None:
        self._note("flush")
        flush(self._pool)

    def save(self) -> None:
        self._note("save")
        save(self._pool)

    def fail_over(self) -> None:
        self._note("fail over")
        fail_over(self._pool)


@pytest.mark.parametrize("seed", range(300, 303))
def test_whatever_the_control_plane_does_requests_end_with_their_tokens(pool: Pool, seed: int) -> None:
    driver = FaultyDriver(pool, seed)
    rules = {
        driver.add: 8, driver.step: 20, driver.abort: 2, driver.wait: 2, driver.flush: 2, driver.save: 2,
        driver.fail_over: 2, driver.lose_the_ledger: 1,
    }  # fmt: skip
    try:
        with Managers(pool, 2):
            driver.run(50, rules)
            driver.drain()
        pool.assert_accounts_settle()
        driver.assert_every_request_has_its_tokens()
        pool.assert_nothing_is_owed()
    except BaseException:
        print("\n".join(driver.history))
        raise
