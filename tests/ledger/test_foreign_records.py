"""Somebody else writes into the ledger's keys, or loses some: only the member whose they were is unreadable, and heals.

Whatever the damage, whoever asks hears LedgerUnavailable or an answer, never anything else.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from megatron_distkv.errors import LedgerUnavailable, SupersededError
from megatron_distkv.ledger import (
    DebtLedger,
    InstanceReport,
    MoveOrder,
    RequestPlacementEntry,
)
from megatron_distkv.ledger.embedded_server import EmbeddedServer
from megatron_distkv.ledger.opening import open_ledger
from megatron_distkv.ledger.redis_ledger import RedisLedger
from megatron_distkv.messages import Counted
from megatron_distkv.pool import check_picture, picture_of
from megatron_distkv.rblock import InstanceId, LoanId
from tests.ledger.one_answer_server import OneAnswerServer
from tests.pool.members import info

A, B = InstanceId("a"), InstanceId("b")
KEYS = [
    "state", "changed", "left", "leases", "free", "caps", "instance:a", "instance:b", "loan:l1", "loan:l2", "debts:a",
    "credits:b", "pending", "leader", "events",
]  # fmt: skip
FIELDS = [
    "epoch", "address", "total", "reserved", "local_used", "lent", "borrowed", "state", "num_running", "info", "seal",
    "placements", "debtor", "debtor_epoch", "creditor", "creditor_epoch", "num_rblocks", "candidate", "until", "event",
    "version", "horizon", "now", "wall", "lease", "counted_at", "offered", "caps", "members", "moves", "server",
    "counted",
]  # fmt: skip
values = st.one_of(
    st.binary(max_size=8), st.sampled_from([b"", b"-1", b"1e300", b"nan", b"9" * 40,
                                            b"\xff\xfe", b"{", b"|", b"[]", b"a|b"])
)  # fmt: skip
# key, field, value, and how: as a field of a hash, or as a value of the wrong type
damage = st.tuples(
    st.sampled_from(KEYS), st.sampled_from(FIELDS), values,
    st.sampled_from(["field", "missing", "string", "list", "zset"])
)  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer() as running:
        yield running


@pytest.fixture(scope="module")
def raw(server: EmbeddedServer) -> Iterator[redis.Redis]:
    """How somebody else reaches the server."""
    with redis.Redis.from_url(server.url, decode_responses=True) as client:
        yield client


@pytest.fixture(scope="module")
def ledger(server: EmbeddedServer) -> Iterator[DebtLedger]:
    opened = open_ledger(server.url, "p")
    yield opened
    opened.close()


def fill(ledger: DebtLedger) -> tuple[int, int]:
    """A pool of two with a loan, a pending one, placements, a plan and a leader; the epochs."""
    epochs = [ledger.register(name, "unix:x", 64, 0, 60.0, info=info()).epoch for name in (A, B)]
    for loan in ("l1", "l2"):
        assert ledger.borrow(LoanId(loan), A, epochs[0], B, epochs[1], 4, 60.0) is None
    ledger.accept(LoanId("l1"), B, epochs[1])
    ledger.heartbeat(A, epochs[0], InstanceReport(3, placements=(RequestPlacementEntry("r", B, 2, False),)), 60.0)
    assert ledger.lead("me", 60.0)
    assert ledger.publish_moves("me", [MoveOrder("r", A, B, 2)])
    return epochs[0], epochs[1]


def spoil(raw: redis.Redis, key: str, field: str, value: bytes, how: str) -> None:
    key = "{p}:" + key
    if how == "field" and raw.type(key) == "hash":
        raw.hset(key, field, value)
    elif how == "missing" and raw.type(key) == "hash":
        raw.hdel(key, field)
    else:
        raw.delete(key)
        if how == "list":
            raw.rpush(key, value)
        elif how == "zset":
            raw.zadd(key, {value: 7})
        else:
            raw.set(key, value)


def everything(ledger: DebtLedger, a: int, b: int) -> Iterator[Callable[[], object]]:
    yield lambda: ledger.changes(0, 1)
    yield lambda: ledger.changes(1)
    yield lambda: ledger.known_loans([LoanId("l1"), LoanId("l2")])
    yield lambda: ledger.recommend(A, 5)
    yield lambda: ledger.recommend(B, 5, 1)
    yield lambda: ledger.loans_of(B, b)
    yield lambda: ledger.reclaim(B, b, 2)
    yield lambda: ledger.events(20)
    yield lambda: ledger.accept(LoanId("l2"), B, b)
    yield lambda: ledger.borrow(LoanId("l3"), A, a, B, b, 2, 60.0)
    yield lambda: ledger.restore(LoanId("l4"), A, a, B, b, 2)
    yield lambda: ledger.heartbeat(A, a, InstanceReport(1), 60.0)
    yield lambda: ledger.heartbeat(B, b, InstanceReport(1), 60.0)
    yield lambda: ledger.release(LoanId("l1"), A, a)
    yield lambda: ledger.expire()
    yield lambda: ledger.lead("me", 1.0)
    yield lambda: ledger.publish_moves("me", [])
    yield lambda: ledger.register(A, "unix:x", 64, 0, 60.0, epoch=a)
    yield lambda: ledger.deregister(B, b)
    yield lambda: ledger.changes(0)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damages=st.lists(damage, min_size=1, max_size=3))
@example(damages=[("instance:a", "address", b"\xff\xfe", "field")])
@example(damages=[("instance:a", "info", b"{", "field")])
@example(damages=[("instance:a", "state", b"gone", "field")])
@example(damages=[("instance:a", "total", b"", "missing")])
@example(damages=[("loan:l1", "creditor", b"", "missing")])
@example(damages=[("instance:a", "moves", b"no bars", "field")])
@example(damages=[("instance:a", "placements", b"x|y", "field")])
@example(damages=[("instance:a", "counted", b"[7]", "field")])
def test_whatever_the_damage_there_is_an_answer(
    ledger: DebtLedger, raw: redis.Redis, damages: list[tuple[str, str, bytes, str]]
) -> None:
    raw.flushall()
    a, b = fill(ledger)
    for key, field, value, how in damages:
        spoil(raw, key, field, value, how)
    for operation in everything(ledger, a, b):
        with contextlib.suppress(LedgerUnavailable, SupersededError):
            operation()
    assert raw.ping()


@pytest.mark.parametrize(
    "reply",
    [b"$-1", b"*0", b"*1 $1 x", b"$4 text", b":7", b"*2 *2 :1 :2 *1 :3", b"*2 $1 k $1 v", b"+OK", b"-ERR odd", b"?!"],
)
def test_a_reply_of_another_shape_is_a_ledger_that_is_away(reply: bytes, tmp_path: Path) -> None:
    # Given a server that has this one answer to whatever it is asked (a line for each word)
    odd = OneAnswerServer(tmp_path / "odd.sock", reply.replace(b" ", b"\r\n") + b"\r\n")
    with odd, contextlib.closing(RedisLedger(odd.url, "p")) as ledger:
        for operation in everything(ledger, 1, 2):
            with contextlib.suppress(LedgerUnavailable, SupersededError):
                operation()
        # Then it was asked, and whoever asked has heard that it is away, or an answer
        assert odd.num_asked > 0


class Pool:
    """Members as instances are: they report, register again where the ledger asks for it, compare what they lend."""

    def __init__(self, server: EmbeddedServer, name: str = "odd") -> None:
        self.now_ms = 1_763_700_000_000
        self.url = server.url
        self.raw, self.name = redis.Redis.from_url(server.url, decode_responses=True), name
        self.raw.flushall()
        self.ledger = RedisLedger(server.url, name, clock_ms=lambda: self.now_ms)
        self.epochs = {name: self.join(InstanceId(name)) for name in "abcd"}
        for loan, debtor, creditor in (("l1", "a", "b"), ("l2", "c", "d")):
            terms = (LoanId(loan), debtor, self.epochs[debtor], creditor, self.epochs[creditor])
            assert self.ledger.borrow(*terms, 4, 9.0) is None  # type: ignore[arg-type]
            assert self.ledger.accept(LoanId(loan), InstanceId(creditor), self.epochs[creditor]) is None
        for name in self.epochs:
            self.report(InstanceId(name))

    def join(self, name: InstanceId, epoch: int = 0) -> int:
        generation = str(self.raw.hget(f"{{{self.name}}}:state", "generation"))
        registered = self.ledger.register(
            name, f"at:{name}", 64, 0, 10.0, epoch=epoch, generation=generation, info=info()
        )
        return registered.epoch

    def report(self, name: InstanceId) -> None:
        placed = (RequestPlacementEntry(f"r-{name}", name, 3, True),)
        if not self.ledger.heartbeat(name, self.epochs[name], InstanceReport(3, placements=placed), 10.0).known:
            self.epochs[name] = self.join(name, self.epochs[name])
            assert self.ledger.heartbeat(name, self.epochs[name], InstanceReport(3, placements=placed), 10.0).known
        self.ledger.loans_of(name, self.epochs[name])

    def close(self) -> None:
        self.ledger.close()
        self.raw.close()


@pytest.fixture(scope="module")
def odd_server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer() as server:
        yield server


@pytest.mark.parametrize("how", ["missing", "garbage", "half of it", "of another pool", "of another type"])
@pytest.mark.parametrize(
    "key", ["instance:a", "instance:b", "leases", "free", "caps", "changed", "credits:b", "debts:a", "loan:l1"]
)
def test_one_odd_record_spoils_no_other_and_heals(odd_server: EmbeddedServer, key: str, how: str) -> None:
    # Given two pools, and a pool's key that somebody else has spoilt
    pool = Pool(odd_server)
    key = "{odd}:" + key
    before = {member.instance: member for member in pool.ledger.changes(0).members}
    spoil_one(pool, key, how)

    # When others go on, then they read, report, borrow and are recommended as if nothing was
    read = {member.instance: member for member in pool.ledger.changes(0).members}
    for name in (InstanceId("c"), InstanceId("d")):
        if not key.endswith(("leases", "changed")):
            assert read[name] == before[name]
        pool.report(name)
    assert [x.instance for x in pool.ledger.recommend(InstanceId("c"), 9) if x.instance == "d"] == ["d"]
    terms = (LoanId("l3"), InstanceId("c"), pool.epochs["c"], InstanceId("d"), pool.epochs["d"])
    assert pool.ledger.borrow(*terms, 4, 9.0) is None
    assert pool.ledger.release(LoanId("l3"), InstanceId("c"), pool.epochs["c"]) == 4

    # And when all report again, a few times and until leases of strangers have ended, the books are in order
    for _ in range(5):
        pool.now_ms += 4_000
        for name in pool.epochs:
            pool.report(InstanceId(name))
    healed = pool.ledger.snapshot()
    assert (healed.unreadable, [record.instance for record in healed.instances]) == ({}, ["a", "b", "c", "d"])
    assert check_picture(picture_of(healed)) == []
    assert "l2" in {loan.key for loan in healed.loans}
    pool.close()


@pytest.mark.parametrize(
    ("written", "is_named"), [(None, False), ("{", True), ("[7]", True), ('[["x",{"a-b":"c"},1]]', True)]
)
def test_counts_that_are_missing_or_odd_cost_nothing_but_themselves(
    odd_server: EmbeddedServer, written: str | None, is_named: bool
) -> None:
    # Given a member of a version that counts nothing, or whose counts somebody else has written
    pool, a = Pool(odd_server), InstanceId("a")
    if written is None:
        pool.raw.hdel("{odd}:instance:a", "counted")
    else:
        pool.raw.hset("{odd}:instance:a", "counted", written)
    # Then it is read all the same
    read = pool.ledger.snapshot()
    assert [record.instance for record in read.instances] == ["a", "b", "c", "d"]
    assert ("its counts" in read.unreadable.get(a, "")) == is_named
    # And the next counts that it tells are there
    counted = (Counted("distkv_loans_made_total", {}, 1.0),)
    for _ in range(2):
        if not pool.ledger.heartbeat(a, pool.epochs[a], InstanceReport(3, counted=counted), 10.0).known:
            pool.epochs[a] = pool.join(a, pool.epochs[a])
    read = pool.ledger.snapshot()
    assert ([x.counted for x in read.instances if x.instance == a], read.unreadable) == ([counted], {})
    pool.close()


def spoil_one(pool: Pool, key: str, how: str) -> None:
    raw, kind = pool.raw, pool.raw.type(key)
    if how == "half of it" and kind == "hash":
        raw.hdel(key, *sorted(raw.hkeys(key))[::2])
    elif how == "half of it":
        raw.zrem(key, "a", "c") if kind == "zset" else raw.srem(key, "l1")
    elif how == "garbage" and kind == "hash":
        raw.hset(key, mapping=dict.fromkeys(raw.hkeys(key), b"\xff{9"))
    elif how == "garbage":
        raw.zadd(key, {b"\xff": 7e15, "x": 1}) if kind == "zset" else raw.sadd(key, b"\xff", "x")
    else:
        raw.delete(key)
        if how == "of another type":
            raw.rpush(key, "x")
        elif how == "of another pool":
            other = RedisLedger(pool.url, "other", clock_ms=lambda: pool.now_ms + 7_777)
            epochs = [other.register(InstanceId(x), f"elsewhere:{x}", 8, 0, 9.0).epoch for x in "abcdz"]
            sides = (LoanId("l1"), InstanceId("a"), epochs[0], InstanceId("b"), epochs[1])
            assert other.borrow(*sides, 2, 9.0) is None
            raw.copy(key.replace("odd", "other"), key)
            other.close()
