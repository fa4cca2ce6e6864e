"""`distkv drain` with requests in mid-stream, real processes and real kill -9: the same text, whoever dies when."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from megatron_distkv.launch.local_cluster import LocalCluster

from megatron_distkv.cli.main import main
from megatron_distkv.ledger import InstanceState
from tests.e2e.conftest import cluster_config, openai_client

# Two choices, sampled, with log-probabilities; so slow a copy that there is a middle to die in.
SAMPLED = {"model": "distkv", "seed": 5, "temperature": 0.9, "logprobs": 1, "n": 2, "max_tokens": 700}
PROMPT = [40 + i % 80 for i in range(120)]


@pytest.fixture
def cluster(byte_llama: Path) -> Iterator[LocalCluster]:
    changes = {
        "instances": 5,
        "kv_cache": {"num_rblocks": 256, "rblock_size": 8},
        "lending": {"deadline_s": 2.0, "max_moved_rblocks_per_step": 2},
    }
    with LocalCluster(cluster_config(byte_llama, **changes)) as running:
        yield running


def stream(cluster: LocalCluster, instance: str | None, after_first: Callable[[], None]) -> tuple[list[str], Any]:
    """Texts of both choices and the usage."""
    body = {"ignore_eos": True, **({"instance": instance} if instance else {})}
    texts, usage, has_begun = ["", ""], None, False
    with openai_client(cluster) as client:
        options = {"stream": True, "stream_options": {"include_usage": True}}
        for chunk in client.completions.create(prompt=PROMPT, extra_body=body, **SAMPLED, **options):
            usage = chunk.usage or usage
            for choice in chunk.choices:
                texts[choice.index] += choice.text
            if not has_begun and all(len(text) > 5 for text in texts):
                has_begun = True
                after_first()
    return texts, usage


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


class Drains:
    """Of a cluster's instances, each begun in a thread."""

    def __init__(self, cluster: LocalCluster) -> None:
        self._cluster = cluster
        self._threads: list[threading.Thread] = []

    def begin(self, name: str) -> None:
        cluster = self._cluster
        arguments = ["drain", name, "--ledger", cluster.ledger_url, "--pool", cluster.config.ledger.pool]
        self._threads.append(threading.Thread(target=main, args=(arguments,)))
        self._threads[-1].start()

    def is_leaving(self, name: str) -> bool:
        record = next((x for x in self._cluster.ledger.snapshot().live if x.instance == name), None)
        return record is None or record.state is InstanceState.DRAINING

    def join(self) -> None:
        for thread in self._threads:
            thread.join()


def used(cluster: LocalCluster, name: str) -> int:
    """rBlocks, of its pool."""
    return next((x.local_used for x in cluster.ledger.snapshot().live if x.instance == name), 0)


def kill(cluster: LocalCluster, name: str) -> None:
    os.killpg(cluster.child(name).process.pid, signal.SIGKILL)


def test_a_drained_instance_hands_its_requests_over_and_any_may_die_meanwhile(cluster: LocalCluster) -> None:
    drains, heirs, killed = Drains(cluster), ("instance-3", "instance-4"), []

    # Given the answer when nothing happens
    calm, _ = stream(cluster, None, lambda: None)

    # When the instance that computes it leaves in the middle of it
    texts, usage = stream(cluster, "instance-0", lambda: drains.begin("instance-0"))
    # Then another goes on from the same token, with nothing computed again, and the first has ended
    assert texts == calm
    assert [kv["num_recomputed_tokens"] for kv in usage.kv] == [0, 0]
    assert all(kv["instance"] != "instance-0" for kv in usage.kv)
    drains.join()
    assert cluster.child("instance-0").process.wait(20) == 0

    # When the one that leaves is killed on its way
    def drain_and_kill() -> None:
        drains.begin("instance-1")
        wait_until(lambda: drains.is_leaving("instance-1"))
        kill(cluster, "instance-1")

    texts, _ = stream(cluster, "instance-1", drain_and_kill)
    assert texts == calm

    # When its successor is killed, before or after it has the request
    def drain_and_kill_heir() -> None:
        drains.begin("instance-2")
        wait_until(lambda: any(used(cluster, heir) > 0 for heir in heirs) or drains.is_leaving("instance-2"))
        killed.append(max(heirs, key=lambda heir: used(cluster, heir)))
        kill(cluster, killed[0])

    texts, _ = stream(cluster, "instance-2", drain_and_kill_heir)
    assert texts == calm

    # And nothing of all this stays
    drains.join()
    stays = {heir for heir in heirs if heir not in killed}
    wait_until(lambda: {record.instance for record in cluster.ledger.snapshot().live} == stays)
    wait_until(lambda: not cluster.ledger.snapshot().loans)
