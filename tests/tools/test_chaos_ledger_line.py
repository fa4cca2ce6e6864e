"""The line between a pool and its ledger, with a real server behind it."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from megatron_distkv.ledger.embedded_server import EmbeddedServer
from tools.bench.chaos.ledger_line import LedgerLine

ONE_WAY_S = 0.15


@pytest.fixture
def line(server: EmbeddedServer, tmp_path: Path) -> Iterator[LedgerLine]:
    with LedgerLine(tmp_path / "line.sock", server.url) as running:
        yield running


def ping_s(client: "redis.Redis") -> float:
    start_s = time.monotonic()
    client.ping()
    return time.monotonic() - start_s


def test_a_delay_counts_both_ways_until_it_is_taken_back(line: LedgerLine) -> None:
    with redis.Redis.from_url(line.url) as client:
        client.set("given", "before")
        line.delay(ONE_WAY_S)
        assert wait_for(lambda: ping_s(client) >= 2 * ONE_WAY_S)
        line.delay(0.0)
        assert wait_for(lambda: ping_s(client) < 2 * ONE_WAY_S)
        assert client.get("given") == b"before"


def test_large_answers_come_whole(line: LedgerLine) -> None:
    with redis.Redis.from_url(line.url) as client:
        line.delay(0.01)
        client.set("large", b"x" * 3_000_000)
        assert client.get("large") == b"x" * 3_000_000


def test_a_ledger_that_is_away_is_an_error_and_comes_back(line: LedgerLine, server: EmbeddedServer) -> None:
    with redis.Redis.from_url(line.url, retry=None) as client:
        assert client.ping()
        server.kill()
        with pytest.raises(redis.ConnectionError):
            client.ping()
        server.start()
        assert client.ping()


def wait_for(is_so: Callable[[], bool], within_s: float = 30.0) -> bool:
    end_s = time.monotonic() + within_s
    while time.monotonic() < end_s:
        if is_so():
            return True
    return False
