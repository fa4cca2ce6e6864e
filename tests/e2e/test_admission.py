"""What the gateway holds back, and what it refuses, by the openai package over a real pool."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import httpx
import pytest
from megatron_distkv.launch.local_cluster import LocalCluster
from openai import BadRequestError, OpenAI, RateLimitError

from megatron_distkv.cli.pool_arguments import LEDGER_VARIABLE
from megatron_distkv.pool import picture_of
from megatron_distkv.rblock import InstanceId, LoanId
from tests.e2e.conftest import NUM_RBLOCKS, OWN_TOKENS, RBLOCK_SIZE, Reference
from tests.e2e.test_api import GREEDY, as_text, random_prompt, wait_for_no_debts
from tests.pool.members import info

# More than half of the pool: two of them do not fit at one time.
LONG = int(1.7 * OWN_TOKENS)
LONGEST = (NUM_RBLOCKS + 2 * int(0.9 * NUM_RBLOCKS)) * RBLOCK_SIZE


@pytest.fixture(scope="module")
def strict(cluster: LocalCluster) -> Iterator[OpenAI]:
    """A second gateway of the same pool, which lets one request wait, and not for long."""
    command = [sys.executable, "-m", "megatron_distkv.cli.main", "gateway", "--port", "0", "--pool"]
    options = [cluster.config.ledger.pool, "--max-queued-requests", "1", "--max-queue-wait-s", "1"]
    env = {**os.environ, **(cluster.child("gateway").env or {}), LEDGER_VARIABLE: cluster.ledger_url}
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True, env=env) as gateway:
        assert gateway.stdout is not None
        url = gateway.stdout.readline().split()[-1]
        with OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120) as api:
            yield api
        gateway.terminate()


def ask(api: OpenAI, path: str) -> str:
    return httpx.get(str(api.base_url).removesuffix("/v1/") + path).text


def metric(api: OpenAI, name: str) -> float:
    return sum(float(line.split()[-1]) for line in ask(api, "/metrics").splitlines() if line.startswith(name))


def wait_until(is_so: Callable[[], bool]) -> None:
    end_s = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < end_s
        time.sleep(0.02)


def wait_until_queued(api: OpenAI, count: int) -> None:
    wait_until(lambda: metric(api, "distkv_queued_requests") == count)


@contextlib.contextmanager
def little_room(cluster: LocalCluster, *gateways: OpenAI) -> Iterator[None]:
    """Somebody has reserved all that may be lent, and gateways know it."""
    ledger, guest = cluster.ledger, InstanceId("guest")
    epoch = ledger.register(guest, "unix:nowhere", 0, 0, 60, info=info(role="lender")).epoch
    for record in picture_of(ledger.snapshot()).live:
        if record.takes_requests:
            ledger.borrow(
                LoanId(f"guest.{record.instance}"), guest, epoch, record.instance, record.epoch, record.free_to_lend, 60
            )
    for api in gateways:
        wait_until(lambda api=api: ask(api, "/debts").count("guest owes") == cluster.config.instances)
    yield
    ledger.deregister(guest, epoch)
    wait_for_no_debts(cluster)


@pytest.mark.parametrize("stream", [False, True])
def test_what_can_never_fit_is_refused_with_the_longest_that_fits(stream: bool, client: OpenAI) -> None:
    with pytest.raises(BadRequestError, match=f"the longest that the pool's memory holds now is {LONGEST}") as refused:
        client.completions.create(prompt=random_prompt(LONGEST), max_tokens=2, stream=stream, **GREEDY)
    assert refused.value.code == "context_length_exceeded"
    assert metric(client, 'distkv_refused_requests_total{reason="context_length_exceeded"}') > 0


def test_what_fits_later_waits_for_room(client: OpenAI, cluster: LocalCluster, reference: Reference) -> None:
    prompt, texts = random_prompt(LONG, seed=2), []

    def complete() -> None:
        texts.append(client.completions.create(prompt=prompt, max_tokens=8, **GREEDY).choices[0].text)

    asking = threading.Thread(target=complete)
    # Given a pool where nobody lends any more
    with little_room(cluster, client):
        # When a request comes that needs more than one instance has, then it waits at the gateway
        asking.start()
        wait_until_queued(client, 1)
        assert texts == []
        # And short ones need not wait
        assert client.completions.create(prompt="x", max_tokens=2, **GREEDY).usage is not None
    # And it is computed when there is room
    asking.join()
    assert texts == [as_text(reference(prompt, 8))]
    assert metric(client, "distkv_queued_requests") == 0
    wait_for_no_debts(cluster)


@pytest.mark.parametrize("stream", [False, True])
def test_past_its_bounds_the_queue_refuses(stream: bool, client: OpenAI, strict: OpenAI, cluster: LocalCluster) -> None:
    errors: list[RateLimitError] = []

    def complete() -> None:
        with pytest.raises(RateLimitError) as caught:
            strict.completions.create(prompt=random_prompt(LONG), max_tokens=8, stream=stream, **GREEDY)
        errors.append(caught.value)

    asking = threading.Thread(target=complete)
    # Given one request that waits at this gateway
    with little_room(cluster, strict):
        asking.start()
        wait_until_queued(strict, 1)
        # When a second comes, then it hears at once when to come again, and the first after its time
        complete()
        asking.join()
    assert [error.code for error in errors] == ["queue_full", "queue_timeout"]
    assert all(1 <= int(error.response.headers["Retry-After"]) <= 60 for error in errors)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_the_queue_leaves_nothing(stream: bool, client: OpenAI, cluster: LocalCluster) -> None:
    body = {"model": "distkv", "prompt": random_prompt(LONG), "max_tokens": 8, "stream": stream}
    with little_room(cluster, client):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(cluster.base_url + "/completions", json=body, timeout=1.0)
        wait_until_queued(client, 0)
