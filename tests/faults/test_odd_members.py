"""Members that nobody understands, or that never do what they promise: the rest of the pool goes on as ever."""

import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from megatron_distkv.launch.local_cluster import LocalCluster

from megatron_distkv.errors import LedgerUnavailable
from megatron_distkv.ledger import DebtLedger, InstanceReport
from megatron_distkv.pool import picture_of, write_info
from megatron_distkv.rblock import InstanceId
from tests.e2e.conftest import OWN_TOKENS, RBLOCK_SIZE, cluster_config

ODD, DEAF = InstanceId("odd-one"), InstanceId("deaf-one")
LEASE_S = 3.0
# Longer than an instance keeps a request that gets no memory, and than a gateway keeps one in its queue.
QUEUE_WAIT_S, ENDS_WITHIN_S = 20.0, 90.0


@pytest.fixture
def cluster(byte_llama: Path) -> Iterator[LocalCluster]:
    changes: dict[str, Any] = {"instances": 2, "admission": {"max_queue_wait_s": QUEUE_WAIT_S}}
    with LocalCluster(cluster_config(byte_llama, **changes)) as running:
        yield running


def ask(cluster: LocalCluster, length: int, **more: Any) -> httpx.Response:
    body = {"model": "distkv", "prompt": [65 + i % 20 for i in range(length)], "max_tokens": 4, "temperature": 0,
            "ignore_eos": True, **more}  # fmt: skip
    return httpx.post(f"{cluster.base_url}/completions", json=body, timeout=ENDS_WITHIN_S)


@contextmanager
def reporting(ledger: DebtLedger, name: InstanceId, num_rblocks: int, info: dict[str, str]) -> Iterator[None]:
    """A member that keeps its lease, and says this of itself."""
    epoch = ledger.register(name, "unix:/nowhere/at.all", num_rblocks, 0, LEASE_S, info=info).epoch
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(LEASE_S / 6):
            with contextlib.suppress(LedgerUnavailable):
                ledger.heartbeat(name, epoch, InstanceReport(0), LEASE_S)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("info", [{}, {"role": "lender", "rblock_size": "8"}, {"member": '{"format": 99, "info": 1}'}])
def test_a_record_that_cannot_be_read_is_left_out_and_said_once(cluster: LocalCluster, info: dict[str, str]) -> None:
    # Given a live member of another version
    with reporting(cluster.ledger, ODD, 64, info):
        time.sleep(1.0)  # several looks of everybody
        # When clients ask, also for what must be borrowed
        for length in (8, OWN_TOKENS + 40):
            answer = ask(cluster, length)
            assert answer.status_code == 200, answer.text
        # Then it is nowhere, and everybody else is
        health = httpx.get(cluster.base_url.removesuffix("/v1") + "/health").json()
        assert (health["status"], health["instances"]) == ("ok", cluster.instance_ids)
        assert ODD in picture_of(cluster.ledger.snapshot()).unreadable
    # And it was said once
    said = cluster.child("gateway").log.read_text().count(f"{ODD} is left alone")
    assert said == 1


@pytest.mark.nightly  # a minute of waiting; tests/virtual_time has the same without the other processes
def test_a_request_that_is_never_lent_to_ends_and_holds_up_nobody(cluster: LocalCluster) -> None:
    # Given a member that seems to have much memory to lend, and never answers
    (shape,) = {member.info.shape for member in picture_of(cluster.ledger.snapshot()).live}
    seems = write_info(picture_of(cluster.ledger.snapshot()).live[0].info.__class__(shape=shape, role="lender"))
    with reporting(cluster.ledger, DEAF, 500, seems), ThreadPoolExecutor(1) as beside:
        time.sleep(1.0)
        # When somebody asks for more than all that do answer hold
        began_s = time.monotonic()
        long = beside.submit(ask, cluster, 3 * OWN_TOKENS, instance="instance-0")
        # Then short ones at the same instance are served meanwhile
        num_served = 0
        while not long.done():
            answer = ask(cluster, RBLOCK_SIZE, instance="instance-0")
            assert answer.status_code == 200, answer.text
            num_served += 1
            time.sleep(0.5)
        assert num_served > 5
        # And it ends with one clear error
        answer = long.result()
        assert time.monotonic() - began_s < ENDS_WITHIN_S
        assert answer.status_code in (429, 503), answer.text
        assert answer.json()["error"]["code"] in ("queue_timeout", "no_progress")
