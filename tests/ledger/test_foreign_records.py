"""Somebody else writes into the ledger's keys: whoever reads them hears LedgerUnavailable, never anything else."""

import contextlib
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from megatron_distkv.errors import LedgerUnavailable, SupersededError
from megatron_distkv.ledger import InstanceReport, Move, RequestPlacementEntry, open_ledger
from megatron_distkv.ledger.embedded_server import EmbeddedServer
from megatron_distkv.ledger.redis_ledger import RedisLedger
from megatron_distkv.rblock import InstanceId, LoanId

A, B = InstanceId("a"), InstanceId("b")
KEYS = [
    "generation", "epoch", "leases", "free", "instance:a", "instance:b", "loans", "loan:l1", "loan:l2", "debts:a",
    "credits:b", "pending", "placements:a", "moves:a", "leader", "events",
]  # fmt: skip
FIELDS = [
    "epoch", "address", "total", "reserved", "local_used", "lent", "borrowed", "state", "num_running", "info", "debtor",
    "debtor_epoch", "creditor", "creditor_epoch", "num_rblocks", "r|b", "candidate", "until", "event",
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
def ledger() -> Iterator[RedisLedger]:
    with EmbeddedServer() as server:
        opened = open_ledger(server.url, "p")
        assert isinstance(opened, RedisLedger)
        yield opened
        opened.close()


def fill(ledger: RedisLedger) -> tuple[int, int]:
    """A pool of two with a loan, a pending one, placements, a plan and a leader; the epochs."""
    ledger._redis.flushall()
    epochs = [ledger.register(name, "unix:x", 64, 0, 60.0, info={"k": "v"}).epoch for name in (A, B)]
    for loan in ("l1", "l2"):
        assert ledger.borrow(LoanId(loan), A, epochs[0], B, epochs[1], 4, 60.0) is None
    ledger.accept(LoanId("l1"), B, epochs[1])
    ledger.heartbeat(A, epochs[0], InstanceReport(3, placements=(RequestPlacementEntry("r", B, 2, False),)), 60.0)
    assert ledger.lead("me", 60.0)
    assert ledger.publish_moves("me", [Move("r", A, B, 2)])
    return epochs[0], epochs[1]


def spoil(ledger: RedisLedger, key: str, field: str, value: bytes, how: str) -> None:
    key, raw = "{p}:" + key, ledger._redis
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


def everything(ledger: RedisLedger, a: int, b: int) -> Iterator[Callable[[], object]]:
    yield lambda: ledger.snapshot()
    yield lambda: ledger.recommend(A, 10, 5)
    yield lambda: ledger.recommend(B, 10, 5)
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
    yield lambda: ledger.snapshot()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damages=st.lists(damage, min_size=1, max_size=3))
@example(damages=[("instance:a", "address", b"\xff\xfe", "field")])
@example(damages=[("instance:a", "info", b"{", "field")])
@example(damages=[("instance:a", "state", b"gone", "field")])
@example(damages=[("instance:a", "total", b"", "missing")])
@example(damages=[("loan:l1", "creditor", b"", "missing")])
@example(damages=[("moves:a", "x", b"no bars", "list")])
@example(damages=[("placements:a", "r|b", b"x|y", "field")])
def test_records_that_cannot_be_read_are_a_ledger_that_is_away(
    ledger: RedisLedger, damages: list[tuple[str, str, bytes, str]]
) -> None:
    a, b = fill(ledger)
    for key, field, value, how in damages:
        spoil(ledger, key, field, value, how)
    for operation in everything(ledger, a, b):
        with contextlib.suppress(LedgerUnavailable, SupersededError):
            operation()
    assert ledger._redis.ping()


def test_a_reply_of_another_shape_is_a_ledger_that_is_away(
    ledger: RedisLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = fill(ledger)
    for reply in (None, [], [b"x"], "text", 7, [[1, 2], [3]], {"k": "v"}):
        scripts = {name: (lambda reply=reply, **_: reply) for name in ledger._scripts}
        monkeypatch.setattr(ledger, "_scripts", scripts)
        for operation in everything(ledger, a, b):
            with contextlib.suppress(LedgerUnavailable, SupersededError):
                operation()
