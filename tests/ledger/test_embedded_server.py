"""The embedded server: dies with its parent, keeps a password, and a dead or hung one is noticed."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from megatron_distkv.errors import LedgerUnavailable, UserError
from megatron_distkv.ledger import embedded_server
from megatron_distkv.ledger.embedded_server import EmbeddedServer
from megatron_distkv.ledger.opening import open_ledger
from megatron_distkv.ledger.redis_ledger import RedisLedger
from megatron_distkv.rblock import InstanceId


def wait_until(condition: object, timeout_s: float = 10.0) -> bool:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.02)
    return False


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def directory_of(url: str) -> Path:
    """Its own, where its socket lies."""
    return Path(urlsplit(url).path).parent


def test_the_server_dies_with_a_killed_parent() -> None:
    # Given a process with an embedded server
    code = (
        "from megatron_distkv.ledger.embedded_server import EmbeddedServer as S; import time\n"
        "s = S().start(); print(s.pid, s.url, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid, url = parent.stdout.readline().split()
    assert is_running(int(pid))

    # When the parent is killed with -9
    parent.kill()
    parent.wait()
    parent.stdout.close()

    # Then the server ends too
    assert wait_until(lambda: not is_running(int(pid)))
    shutil.rmtree(directory_of(url))


def test_a_server_that_hangs_is_stopped_too(monkeypatch: pytest.MonkeyPatch) -> None:
    # Given a server that cannot end on SIGTERM
    monkeypatch.setattr(embedded_server, "STOP_TIMEOUT_S", 0.1)
    server = EmbeddedServer().start()
    pid = server.pid
    os.kill(pid, signal.SIGSTOP)

    # When it is to stop / Then it does
    server.stop()
    assert not is_running(pid)


def test_stop_leaves_no_process_and_no_directory() -> None:
    server = EmbeddedServer().start()
    pid, directory = server.pid, directory_of(server.url)
    assert directory.exists()
    server.stop()
    assert not is_running(pid)
    assert not directory.exists()


def test_a_hung_server_raises_instead_of_hanging() -> None:
    with EmbeddedServer() as server:
        ledger = RedisLedger(server.url, "hung", timeout_s=0.2)
        ledger.register(InstanceId("a"), "x", 4, 0, 5.0)
        os.kill(server.pid, signal.SIGSTOP)
        with pytest.raises(LedgerUnavailable):
            ledger.snapshot()
        os.kill(server.pid, signal.SIGCONT)
        assert wait_until(lambda: len(ledger.snapshot().instances) == 1)
        ledger.close()


def test_a_restarted_server_is_used_again_and_is_empty() -> None:
    with EmbeddedServer() as server:
        ledger = RedisLedger(server.url, "again", timeout_s=1.0)
        ledger.register(InstanceId("a"), "x", 4, 0, 5.0)
        server.kill()
        with pytest.raises(LedgerUnavailable):
            ledger.snapshot()
        server.start()
        assert ledger.snapshot().instances == ()
        ledger.close()


def test_a_password_is_asked_for_and_accepted() -> None:
    with EmbeddedServer(password="open sesame".replace(" ", "-")) as server:
        open_ledger(server.url, "p").close()
        with pytest.raises(UserError, match="password"):
            open_ledger(server.url.replace("open-sesame", "wrong"), "p")


def test_a_missing_server_is_one_sentence_without_the_password() -> None:
    with pytest.raises(UserError, match=r"no ledger server answers at redis://127\.0\.0\.1:9") as caught:
        open_ledger("redis://:secret@127.0.0.1:9/0", "p")
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)
