"""A lender is killed while a request, part of which it holds, moves between instances: real processes, kill -9."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from megatron_distkv.launch.local_cluster import LocalCluster

from megatron_distkv.cli.main import main
from megatron_distkv.ledger import InstanceRecord
from tests.e2e.conftest import RBLOCK_SIZE, cluster_config, openai_client

LEAVES, HEIR = "instance-0", "instance-1"
NUM_RBLOCKS = 48
PROMPT = [40 + i % 80 for i in range(NUM_RBLOCKS * RBLOCK_SIZE + 64)]
SAMPLED = {"model": "distkv", "seed": 7, "temperature": 0.9, "logprobs": 1, "max_tokens": 500}


class Answer(NamedTuple):
    text: str
    logprobs: list[float]
    kv: dict[str, Any]


@pytest.fixture
def cluster(byte_llama: Path) -> Iterator[LocalCluster]:
    """So slow a copy, and such frequent heartbeats, that there is a middle to kill in."""
    changes = {
        "instances": 2,
        "lenders": 2,
        "lender_rblocks": 2 * NUM_RBLOCKS,
        "kv_cache": {"num_rblocks": NUM_RBLOCKS, "rblock_size": RBLOCK_SIZE},
        "lending": {"deadline_s": 2.0, "max_moved_rblocks_per_step": 1},
        "ledger": {"url": "embedded://", "heartbeat_interval_s": 0.03, "lease_s": 2.0},
    }
    with LocalCluster(cluster_config(byte_llama, **changes)) as running:
        yield running


def ask(cluster: LocalCluster, instance: str, after_first: Callable[[], None] = lambda: None) -> Answer:
    text, logprobs, kv = "", [], {}
    options = {"stream": True, "stream_options": {"include_usage": True}}
    body = {"ignore_eos": True, "instance": instance}
    with openai_client(cluster) as client:
        for place, chunk in enumerate(client.completions.create(prompt=PROMPT, extra_body=body, **SAMPLED, **options)):
            for choice in chunk.choices:
                text += choice.text
                logprobs += choice.logprobs.token_logprobs
            if place == 3:
                after_first()
            if chunk.usage:
                (kv,) = chunk.usage.kv
    return Answer(text, logprobs, kv)


def record(cluster: LocalCluster, name: str) -> InstanceRecord | None:
    return next((x for x in cluster.ledger.snapshot().live if x.instance == name), None)


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def lent(cluster: LocalCluster, name: str) -> int:
    found = record(cluster, name)
    return 0 if found is None else found.lent


def uses_memory(cluster: LocalCluster, name: str) -> bool:
    found = record(cluster, name)
    return found is not None and found.local_used > 0


def test_a_creditor_killed_in_the_middle_of_a_handover(cluster: LocalCluster) -> None:
    # Given what is answered when nothing happens
    calm = ask(cluster, LEAVES)
    held = sum(calm.kv["max_borrowed_rblocks"].values())
    wait_until(lambda: not cluster.ledger.snapshot().loans and not uses_memory(cluster, HEIR))
    killed: list[str] = []
    drain = threading.Thread(target=main, args=(["drain", LEAVES, "--ledger", cluster.ledger_url],))

    # When the lender is killed while a request, part of which it holds, is copied from one instance to another
    def drain_and_kill() -> None:
        killed.append(max(cluster.lender_ids, key=lambda name: lent(cluster, name)))
        assert lent(cluster, killed[0]) > 0
        drain.start()
        wait_until(lambda: uses_memory(cluster, HEIR))
        cluster.kill(killed[0])

    got = ask(cluster, LEAVES, drain_and_kill)

    # Then the one that leaves noticed before the request was gone
    log = (cluster.run_dir / f"{LEAVES}.log").read_text()
    assert log.index(f"lost creditor {killed[0]}") < log.rindex(f"goes on in {HEIR}")
    # And the client has what it would have had, for what the lender held
    assert got.text == calm.text
    assert got.logprobs == pytest.approx(calm.logprobs, abs=1e-4)
    assert 0 < got.kv["num_recomputed_tokens"] <= (held + 2) * RBLOCK_SIZE
    assert got.kv["instance"] == HEIR

    # And nothing stays: an instance that finds its own books wrong when it is idle ends
    drain.join()
    assert cluster.child(LEAVES).process.wait(20) == 0
    stays = {HEIR, *cluster.lender_ids} - set(killed)
    wait_until(lambda: {x.instance for x in cluster.ledger.snapshot().live} == stays)
    wait_until(lambda: not cluster.ledger.snapshot().loans and not uses_memory(cluster, HEIR))
    assert set(cluster.dead_parts()) == {LEAVES, *killed}
