"""An instance that stood still for longer than its lease, and was replaced: it ends, and leaves the new one alone."""

import os
import signal
import time
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from megatron_distkv.launch.local_cluster import LocalCluster
from megatron_distkv.launch.processes import Child

from megatron_distkv.config.cluster import ClusterConfig
from tests.soon import SOON_S, wait_until

NAME = "instance-1"
LEASE_S = 2.0


@pytest.fixture
def config(byte_llama: Path) -> ClusterConfig:
    return ClusterConfig.model_validate(
        {
            "model": byte_llama, "instances": 2, "launcher": "python", "port": 0,
            "kv_cache": {"num_rblocks": 16, "rblock_size": 16},
            "ledger": {"url": "embedded://", "heartbeat_interval_s": 0.2, "lease_s": LEASE_S},
        }
    )  # fmt: skip


def ask(cluster: LocalCluster, length: int, instance: str) -> httpx.Response:
    body = {"model": "distkv", "prompt": [65 + i % 20 for i in range(length)], "max_tokens": 4, "temperature": 0,
            "ignore_eos": True, "instance": instance}  # fmt: skip
    return httpx.post(f"{cluster.base_url}/completions", json=body, timeout=60)


def test_an_idle_instance_that_was_replaced_ends_and_the_new_one_serves_and_lends(
    config: ClusterConfig, tmp_path: Path
) -> None:
    with LocalCluster(config) as cluster, ExitStack() as stack:
        # Given an idle instance, known to the other as a creditor, that stands still for longer than its lease
        assert ask(cluster, 400, "instance-0").status_code == 200
        old: Child = cluster.child(NAME)
        os.kill(old.process.pid, signal.SIGSTOP)
        wait_until(lambda: NAME not in [x.instance for x in cluster.ledger.snapshot().live])
        # And another that has come under its name
        new = Child(NAME, old.command, tmp_path / "new.log", old.env)
        stack.callback(new.end)
        stack.callback(new.terminate)
        wait_until(lambda: new.ready_line() is not None, lambda: new.log.read_text())

        # When it wakes, then it ends by itself, and says why
        os.kill(old.process.pid, signal.SIGCONT)
        woke_s = time.monotonic()
        old.process.wait(SOON_S)
        assert time.monotonic() - woke_s < SOON_S
        assert old.process.returncode == 3
        assert f"a newer {NAME} has registered" in old.log.read_text()

        # And the new one still serves and lends, over sockets of the same names
        assert ask(cluster, 60, NAME).status_code == 200
        long = ask(cluster, 400, "instance-0")
        assert long.status_code == 200, long.text
        assert NAME in long.json()["usage"]["kv"][0]["max_borrowed_rblocks"]
