"""SIGTERM while a drain is under way: it ends in order and soon, and nothing stays: no process, no socket, no loan."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from megatron_distkv.launch.local_cluster import LocalCluster

from megatron_distkv.ledger.embedded_server import EmbeddedServer
from megatron_distkv.ledger.opening import open_ledger
from tests.e2e.conftest import cluster_config, openai_client
from tests.e2e.up_process import wait_until

# What runs for long, and does not fit into the instance: it borrows of the lender.
PROMPT, MAX_TOKENS = [5 + i % 90 for i in range(140)], 1500
# Far more than it takes, and far less than the drain may take.
SOON_S = 60.0


class Stream:
    """A client whose answer takes long; it ends with an error or with its text."""

    def __init__(self, cluster: LocalCluster) -> None:
        self._cluster = cluster
        self.num_chunks = 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        wait_until(lambda: self.num_chunks > 3, lambda: "no token came")

    def wait(self) -> None:
        self._thread.join(SOON_S)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        try:
            with openai_client(self._cluster) as client:
                for _ in client.completions.create(
                    model="distkv", prompt=PROMPT, max_tokens=MAX_TOKENS, stream=True, extra_body={"ignore_eos": True}
                ):
                    self.num_chunks += 1
        except Exception:  # its only instance is gone: what it is told is another test's
            return


@pytest.fixture(scope="module")
def ledger_server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer() as running:
        yield running


def draining(cluster: LocalCluster) -> "subprocess.Popen[str]":
    """`distkv drain` under way: it waits for what runs, and the instance takes nothing new."""
    words = ["drain", "instance-0", "--ledger", cluster.ledger_url, "--within", "3000"]
    drain = subprocess.Popen(
        [sys.executable, "-m", "megatron_distkv.cli.main", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    wait_until(lambda: "draining" in states(cluster), lambda: str(cluster.ledger.snapshot()))
    assert drain.poll() is None
    return drain


def states(cluster: LocalCluster) -> list[str]:
    return [record.state.value for record in cluster.ledger.snapshot().live]


def test_sigterm_in_a_drain_ends_it_in_order(byte_llama: Path, ledger_server: EmbeddedServer) -> None:
    ledger = {"url": ledger_server.url, "heartbeat_interval_s": 0.1, "lease_s": 300.0}
    with LocalCluster(cluster_config(byte_llama, instances=1, lenders=1, lender_rblocks=300, ledger=ledger)) as cluster:
        # Given an instance that drains, with a request that goes on for long and borrows
        stream = Stream(cluster)
        drain = draining(cluster)
        assert cluster.ledger.snapshot().loans

        # When it gets SIGTERM
        os.killpg(cluster.child("instance-0").process.pid, signal.SIGTERM)

        # Then it ends in order, long before its lease, and so does the command
        assert cluster.child("instance-0").process.wait(SOON_S) == 0
        out, err = drain.communicate(timeout=SOON_S)
        assert (drain.returncode, out) == (0, "instance-0 has left the pool\n"), err
        stream.wait()
        # And neither loan nor socket stays
        snapshot = cluster.ledger.snapshot()
        assert [record.instance for record in snapshot.instances] == ["lender-0"]
        assert snapshot.loans == ()
        wait_until(lambda: used(cluster) == 0, lambda: str(cluster.ledger.snapshot()))
        assert list(cluster.run_dir.glob("instance-0.*sock")) == []

        # And given one like it, when the whole pool is told to end meanwhile
        cluster.restart("instance-0")
        cluster.wait_for(["instance-0"])
        stream = Stream(cluster)
        drain = draining(cluster)
        assert cluster.ledger.snapshot().loans
        run_dir, processes = cluster.run_dir, [cluster.child(name).process for name in cluster.part_names]

    # Then all parts have ended, in order, and neither loan nor file stays
    status = {process.args[-1]: process.returncode for process in processes}  # type: ignore[index]
    assert -signal.SIGKILL not in status.values(), status
    drain.communicate(timeout=SOON_S)
    stream.wait()
    with_ledger = open_ledger(ledger_server.url, "default")
    assert with_ledger.snapshot().instances == ()
    assert with_ledger.snapshot().loans == ()
    with_ledger.close()
    assert not run_dir.exists()


def used(cluster: LocalCluster) -> int:
    return sum(record.local_used + record.lent for record in cluster.ledger.snapshot().live)


def test_a_ledger_that_goes_away_in_a_drain_is_one_sentence(byte_llama: Path) -> None:
    with LocalCluster(cluster_config(byte_llama, instances=1, lenders=1, lender_rblocks=300)) as cluster:
        stream = Stream(cluster)
        drain = draining(cluster)
        assert cluster.ledger_server is not None
        cluster.ledger_server.kill()
        _, err = drain.communicate(timeout=SOON_S)
        assert drain.returncode == 2
        assert "distkv drain: the ledger went away" in err
        assert "Traceback" not in err
        cluster.ledger_server.start()
    stream.wait()
