"""`distkv up` looks after its parts: a dead one is started again, a drained one is not, and what happened is told."""

import contextlib
import signal
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_distkv.cli.main import main
from megatron_distkv.ledger.embedded_server import EmbeddedServer
from megatron_distkv.ledger.opening import open_ledger
from tests.e2e.conftest import cluster_config
from tests.e2e.up_process import PATIENCE_S, Up, wait_until

PROMPT = [5 + i % 90 for i in range(30)]


@pytest.fixture(scope="module")
def short_tmp() -> Iterator[Path]:
    """Sockets lie in it, and their paths have a limit."""
    with tempfile.TemporaryDirectory(prefix="dkv-") as directory:
        yield Path(directory)


@pytest.fixture(scope="module")
def ledger_server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer() as running:
        yield running


@pytest.fixture(scope="module")
def up(byte_llama: Path, tmp_path_factory: pytest.TempPathFactory, short_tmp: Path) -> Iterator[Up]:
    """Shared; each test but the last leaves it whole."""
    with Up(cluster_config(byte_llama, instances=2), tmp_path_factory.mktemp("up"), short_tmp) as running:
        yield running


@pytest.fixture(scope="module")
def answer(up: Up) -> str:
    """What its model says while nothing is wrong."""
    return up.complete(PROMPT)


def test_its_first_lines_say_where_logs_requests_and_ledger_are(up: Up, answer: str) -> None:
    lines = [line for line in up.output.splitlines() if not line.startswith(("starting", "\r"))]
    text = "\n".join(lines)
    assert text.index("logs: ") < text.index("2 instances serve hf checkpoint") < text.index("ledger: distkv ledger")
    assert (up.log_folder / "instance-1.log").exists()


def test_a_killed_gateway_serves_again_at_the_same_url(up: Up, answer: str) -> None:
    url = up.base_url
    # When the gateway is killed
    up.kill(".cli.main gateway")
    # Then it is told why, and the same URL answers again
    up.said(r"gateway ended \(exit status -9\): killed by SIGKILL; starting it again in 2 s")
    up.said("gateway serves again")
    assert up.base_url == url
    assert up.complete(PROMPT) == answer
    assert (up.log_folder / "gateway.0.log").exists()


def test_a_killed_instance_comes_back_and_serves(up: Up, answer: str) -> None:
    up.kill("launch.serve", "instance-0.json")
    up.said(r"instance-0 ended \(exit status -9\): killed by SIGKILL; starting it again in 2 s")
    up.said("instance-0 serves again")
    wait_until(lambda: "instance-0" in members(up), lambda: up.output)
    assert up.complete(PROMPT, instance="instance-0") == answer
    # And the log of its first life is kept beside that of the second
    assert "READY instance-0" in (up.log_folder / "instance-0.0.log").read_text()


def test_a_killed_gmanager_and_a_killed_ledger_server_come_back(up: Up, answer: str) -> None:
    up.kill("gmanager")
    up.said("gmanager serves again")
    up.kill("valkey-server")
    up.said(r"ledger ended \(exit status -9\): killed by SIGKILL; starting it again in 2 s")
    up.said("ledger serves again")
    wait_until(lambda: members(up) == {"instance-0", "instance-1"}, lambda: up.output)
    assert up.complete(PROMPT) == answer


def test_a_drained_instance_stays_away_and_the_logs_are_kept_in_the_end(up: Up, answer: str) -> None:
    # When an instance is drained
    assert main(["drain", "instance-1", "--ledger", ledger_of(up), "--within", "60"]) == 0
    # Then it is not started again, and the other one serves
    up.said("instance-1 has left the pool in order; it is not started again")
    assert up.complete(PROMPT) == answer
    assert members(up) == {"instance-0"}
    assert not (up.log_folder / "instance-1.0.log").exists()

    # And when all ends, nothing stays but the logs: parts had died
    up.process.send_signal(signal.SIGINT)
    assert up.process.wait(120) == 0
    assert up.processes() == set()
    assert f"the logs are in {up.log_folder}" in up.output.splitlines()[-1]
    kept = sorted(path.name for path in up.log_folder.iterdir())
    assert all(name.endswith(".log") for name in kept), kept
    assert {"up.log", "gateway.0.log", "gateway.log", "ledger.0.log"} < set(kept)
    assert "gateway ended" in (up.log_folder / "up.log").read_text()


def members(up: Up) -> set[str]:
    return set(live(ledger_of(up)))


def live(ledger_url: str) -> dict[str, int]:
    """Live members of the pool called default, with their epochs."""
    with contextlib.closing(open_ledger(ledger_url, "default")) as ledger:
        return {str(record.instance): record.epoch for record in ledger.snapshot().live}


def ledger_of(up: Up) -> str:
    return up.said(r"ledger: distkv ledger --ledger (\S+)")[1]


# ---------------------------------------------------------------------- what cannot start


def ended_with(up: Up, sentence: str) -> None:
    """Exit status 2, one sentence, and the logs where it says."""
    assert up.process.wait(PATIENCE_S) == 2, up.output
    (said,) = (line for line in up.output.splitlines() if "distkv up:" in line)
    assert sentence in said
    assert said.endswith(f"; the logs are in {up.log_folder}")
    assert up.log_folder.is_dir()
    assert all(path.suffix == ".log" for path in up.log_folder.iterdir())
    assert up.processes() == set()


def test_a_checkpoint_that_is_not_there_is_one_sentence_with_its_logs(tmp_path: Path, short_tmp: Path) -> None:
    with Up(cluster_config(Path("/nowhere"), instances=1), tmp_path, short_tmp) as up:
        ended_with(up, "instance-0 did not start: no checkpoint at /nowhere")
        assert "no checkpoint at /nowhere" in (up.log_folder / "instance-0.log").read_text()


def test_a_port_that_is_taken_is_one_sentence_before_anything_starts(tmp_path: Path, short_tmp: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with Up(cluster_config(Path("/nowhere"), port=port), tmp_path, short_tmp) as up:
            ended_with(up, f"cannot listen on 127.0.0.1:{port}: Address already in use; choose another --port")


def test_ctrl_c_while_it_starts_ends_all_and_log_dir_keeps_the_logs(
    byte_llama: Path, tmp_path: Path, short_tmp: Path
) -> None:
    before = set(short_tmp.iterdir())
    with Up(cluster_config(byte_llama), tmp_path, short_tmp, "--log-dir", str(tmp_path / "logs")) as up:
        wait_until((tmp_path / "logs" / "instance-2.log").exists, lambda: up.output)
        up.process.send_signal(signal.SIGINT)
        assert up.process.wait(60) == 130
        assert up.processes() == set()
    assert set(short_tmp.iterdir()) == before
    assert (tmp_path / "logs" / "instance-0.log").exists()


# ---------------------------------------------------------------------- two pools on one ledger


@pytest.mark.nightly
def test_two_pools_on_one_ledger(
    byte_llama: Path, tmp_path: Path, short_tmp: Path, ledger_server: EmbeddedServer
) -> None:
    ledger = {"url": ledger_server.url, "heartbeat_interval_s": 0.1, "lease_s": 5.0}
    config = cluster_config(byte_llama, instances=1, ledger=ledger)
    with Up(config, tmp_path, short_tmp) as first:
        alone = first.complete(PROMPT)
        before = live(ledger_server.url)
        # When another one comes under the same name, then it is refused, and the first one feels nothing
        with Up(config, tmp_path, short_tmp) as same:
            ended_with(same, "has live members called instance-0 already")
        assert live(ledger_server.url) == before
        # And when it takes another name, both serve
        with Up(config, tmp_path, short_tmp, "--pool", "other") as other:
            assert other.complete(PROMPT) == alone
            assert first.complete(PROMPT) == alone
            # And when one is killed with all its parts, it can start again at once: it waits for its leases to end
            other.kill_all()
        with Up(config, tmp_path, short_tmp, "--pool", "other") as again:
            assert again.complete(PROMPT) == alone
        assert first.process.poll() is None
