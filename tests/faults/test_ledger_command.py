"""`distkv ledger --check` beside a real instance and a real ledger: 0 when all agree, 1 and a name when not."""

import threading
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import redis

from megatron_distkv.cli.main import main
from megatron_distkv.engine.llm import LLM
from megatron_distkv.engine.serving import Serving
from megatron_distkv.ledger import DebtLedger
from megatron_distkv.ledger.embedded_server import EmbeddedServer
from megatron_distkv.ledger.opening import open_ledger
from megatron_distkv.ledger.redis_ledger import RedisLedger
from tests.conftest import MakeConfig
from tests.pool.members import info


class Running(NamedTuple):
    arguments: list[str]
    url: str
    ledger: DebtLedger


@pytest.fixture
def running(make_config: MakeConfig, server: EmbeddedServer) -> Iterator[Running]:
    stop = threading.Event()
    ledger = open_ledger(server.url, "default")
    with LLM(make_config("v", num_rblocks=16, url=server.url)) as llm:
        thread = threading.Thread(target=Serving(llm.instance).run, args=(stop,))
        thread.start()
        yield Running(["ledger", "--ledger", server.url], server.url, ledger)
        stop.set()
        thread.join()
    ledger.close()


def test_a_pool_in_order_passes(running: Running, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*running.arguments, "--check"]) == 0
    assert capsys.readouterr().out == "the books are in order\n"


def test_a_record_that_counts_wrongly_is_named(running: Running, capsys: pytest.CaptureFixture[str]) -> None:
    with redis.Redis.from_url(running.url) as server:
        server.hincrby("{default}:instance:v", "lent", 3)
    assert main([*running.arguments, "--check"]) == 1
    said = capsys.readouterr().out.splitlines()
    assert "v lends 0 rBlocks by its loans, 3 by its record" in said
    assert "v lends 0 rBlocks, the ledger says 3" in said


def test_an_instance_that_is_not_there_is_named(running: Running, capsys: pytest.CaptureFixture[str]) -> None:
    running.ledger.register("ghost", "unix:x", 4, 0, 60.0, info=info(requests="/nowhere"))  # type: ignore[arg-type]
    assert main([*running.arguments, "--check"]) == 1
    assert "ghost does not answer" in capsys.readouterr().out


def test_history_is_readable(running: Running, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*running.arguments, "--history"]) == 0
    assert "v joined (epoch" in capsys.readouterr().out


def test_a_ledger_that_goes_away_is_one_sentence(
    server: EmbeddedServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RedisLedger, "ping_or_explain", lambda _: server.kill())
    assert main(["ledger", "--ledger", server.url]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "the ledger went away" in line
    server.start()
