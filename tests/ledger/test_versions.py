"""Whose version is too old, of other data, or made up reads the whole pool; who reads on misses nobody."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import redis

from megatron_distkv.errors import LedgerUnavailable
from megatron_distkv.ledger import InstanceReport, MemoryLedger, PoolReader
from megatron_distkv.ledger.embedded_server import EmbeddedServer
from megatron_distkv.ledger.redis_ledger import RedisLedger
from megatron_distkv.rblock import InstanceId

LEASE_S = 60.0
MORE_THAN_ARE_REMEMBERED = 1100


@pytest.fixture(params=["memory", "redis"])
def ledger(request: pytest.FixtureRequest, server: EmbeddedServer) -> Iterator[Any]:
    opened: Any = MemoryLedger() if request.param == "memory" else RedisLedger(server.url, f"versions-{id(request)}")
    yield opened
    opened.close()


def join(ledger: Any, *names: str) -> list[int]:
    return [ledger.register(InstanceId(name), f"at:{name}", 16, 2, LEASE_S).epoch for name in names]


def come_and_go(ledger: Any, count: int) -> None:
    for number in range(count):
        (epoch,) = join(ledger, f"guest-{number}")
        ledger.deregister(InstanceId(f"guest-{number}"), epoch)


def names(reader: PoolReader) -> list[str]:
    return sorted(reader.members)


def test_who_was_away_while_more_left_than_are_remembered_reads_the_whole_pool(ledger: Any) -> None:
    # Given a reader that knows of a, b and c
    (a, *_) = join(ledger, "a", "b", "c")
    reader = PoolReader(ledger.changes)
    version = reader.read().version

    # When a leaves, and after it more than the ledger remembers
    ledger.deregister(InstanceId("a"), a)
    assert not ledger.changes(version).is_whole
    come_and_go(ledger, MORE_THAN_ARE_REMEMBERED)

    # Then the reader begins anew, and a is gone
    assert ledger.changes(version).is_whole
    reader.read()
    assert names(reader) == ["b", "c"]


def test_a_whole_read_goes_on_past_members_that_have_not_changed_for_long(ledger: Any) -> None:
    # Given members that joined before all that the ledger remembers of who left
    join(ledger, "a", "b", "c")
    come_and_go(ledger, MORE_THAN_ARE_REMEMBERED)

    # When they are read one by one, then each comes once
    told, version, has_more = [], 0, True
    while has_more:
        page = ledger.changes(version, 1)
        assert page.is_whole == (version == 0)
        told += [member.instance for member in page.members]
        version, has_more = page.version, page.has_more
    assert told == ["a", "b", "c"]


def test_who_leaves_in_the_middle_of_a_whole_read_is_not_in_it(ledger: Any) -> None:
    # Given a reader that has read a
    a, b, _ = join(ledger, "a", "b", "c")
    first = ledger.changes(0, 1)
    assert [member.instance for member in first.members] == ["a"]

    # When a and b leave, then the rest of the read says that of a
    ledger.deregister(InstanceId("a"), a)
    ledger.deregister(InstanceId("b"), b)
    rest = ledger.changes(first.version)
    assert {member.instance: member.has_left for member in rest.members} == {"c": False, "a": True, "b": True}

    # And when more leave than are remembered, the read begins anew
    come_and_go(ledger, MORE_THAN_ARE_REMEMBERED)
    assert ledger.changes(first.version).is_whole


@pytest.mark.parametrize("version", [-1, 1, 10**9, 2**52, 2**60, 2**105, 2**106 - 1, 2**200])
def test_a_made_up_version_reads_the_whole_pool(ledger: Any, version: int) -> None:
    join(ledger, "a")
    page = ledger.changes(version)
    assert page.is_whole
    assert [member.instance for member in page.members] == ["a"]


def test_a_pool_that_nobody_has_joined_is_whole_and_empty(ledger: Any) -> None:
    for version in (0, 5):
        page = ledger.changes(version)
        assert (page.is_whole, page.has_more, page.members) == (True, False, ())


def test_renewing_a_lease_is_no_change_and_a_report_of_something_new_is(ledger: Any) -> None:
    (a,) = join(ledger, "a")
    version = ledger.changes(0).version
    for used, told in ((0, []), (0, []), (3, ["a"]), (3, [])):
        assert ledger.heartbeat(InstanceId("a"), a, InstanceReport(used), LEASE_S).known
        page = ledger.changes(version)
        assert [member.instance for member in page.members] == told
        version = page.version


def test_data_that_another_life_of_the_server_wrote_are_dropped_before_anybody_sees_them() -> None:
    with EmbeddedServer() as server:
        # Given what a replica has that lacks the last writes: b has left since
        ledger, reader = RedisLedger(server.url, "p"), RedisLedger(server.url, "p")
        a, b = join(ledger, "a", "b")
        with redis.Redis.from_url(server.url) as replica:
            replica.save()
        generation = ledger.changes(0).generation
        ledger.deregister(InstanceId("b"), b)
        version = reader.changes(0).version

        # When a server with that takes over
        server.kill()
        server.start()

        # Then whoever asks first finds nothing, and nobody has reports or loans accepted for the old data
        page = next(page for page in asked_until_it_answers(lambda: reader.changes(version)))
        assert (page.is_whole, page.members) == (True, ())
        assert not ledger.heartbeat(InstanceId("a"), a, InstanceReport(1), LEASE_S).known
        again = ledger.register(InstanceId("a"), "at:a", 16, 2, LEASE_S, epoch=a, generation=generation)
        assert again.epoch == a
        assert again.generation != generation
        assert [event["event"] for event in ledger.events(9)][-2:] == ["rebuild", "join"]
        ledger.close()
        reader.close()


def asked_until_it_answers(ask: Any) -> Iterator[Any]:
    """The first call may find the connection that the old server closed."""
    while True:
        with contextlib.suppress(LedgerUnavailable):
            yield ask()
