"""/metrics of a real pool: what instances count and whom they refuse, and nothing of who has died."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import msgspec
import pytest
from megatron_distkv.launch.local_cluster import LocalCluster
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from megatron_distkv.engine.addresses import rank_address
from tests.e2e.conftest import cluster_config, openai_client
from tests.transport.raw_peer import RawPeer, hello

PATIENCE_S = 60.0


LENDER_RBLOCKS = 64


@pytest.fixture(scope="module")
def pool(byte_llama: Path) -> Iterator[LocalCluster]:
    with LocalCluster(cluster_config(byte_llama, instances=2)) as running:
        yield running


@pytest.fixture(scope="module")
def many_ranks(byte_llama: Path) -> Iterator[LocalCluster]:
    """An instance of two ranks, and a lender."""
    parts = {"instances": 1, "tensor_parallel": 2, "lenders": 1, "lender_rblocks": LENDER_RBLOCKS}
    # A long lease: two ranks and a launcher start on whatever cores there are
    ledger = {"url": "embedded://", "heartbeat_interval_s": 0.1, "lease_s": 10.0}
    config = cluster_config(byte_llama, launcher="deepspeed", ledger=ledger, start_timeout_s=600.0, **parts)
    with LocalCluster(config) as running:
        yield running


def scrape(cluster: LocalCluster) -> dict[str, Metric]:
    text = httpx.get(cluster.base_url.removesuffix("/v1") + "/metrics", timeout=PATIENCE_S).text
    return {family.name: family for family in text_string_to_metric_families(text)}


def value(cluster: LocalCluster, name: str, **labels: str) -> float:
    samples = scrape(cluster)[name].samples
    return sum(x.value for x in samples if x.name.endswith("_total") and labels.items() <= x.labels.items())


def wait_until(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.2)


def test_counts_of_instances_reach_prometheus(pool: LocalCluster) -> None:
    # Given a request that is longer than its instance: it borrows
    with openai_client(pool) as api:
        prompt = [5 + i % 200 for i in range(150)]
        how = {"instance": "instance-0", "ignore_eos": True}
        api.completions.create(model="distkv", prompt=prompt, max_tokens=20, extra_body=how)
    # Then its steps and tokens are instance-0's, its loans instance-1's, and they have ended
    wait_until(lambda: value(pool, "distkv_loans_ended", instance="instance-1") >= 1)
    assert value(pool, "distkv_computed_tokens", instance="instance-0") >= 169
    assert value(pool, "distkv_steps", instance="instance-0") >= 20
    assert value(pool, "distkv_loans_made", instance="instance-0") == 0
    made, ended = (value(pool, f"distkv_loans_{what}", instance="instance-1") for what in ("made", "ended"))
    assert made == ended

    # And when a stranger asks instance-1 for a channel of another pool, the alarm is counted there
    with RawPeer(rank_address(pool.run_dir, "instance-1", 0)) as stranger:
        stranger.say(msgspec.msgpack.encode(hello(pool="another")))
    wait_until(lambda: value(pool, "distkv_refused_channels", instance="instance-1", reason="pool") == 1)
    assert value(pool, "distkv_refused_channels", instance="instance-0") == 0


def test_who_has_died_is_gone_and_who_comes_back_begins_anew(pool: LocalCluster) -> None:
    # Given two instances in /metrics
    wait_until(lambda: names_in(scrape(pool)) == {"instance-0", "instance-1"})
    # When one is killed, then no series of its is left
    pool.kill("instance-1")
    wait_until(lambda: names_in(scrape(pool)) == {"instance-0"})
    # And when it comes back, its counters begin anew
    pool.restart("instance-1")
    pool.wait_for(["instance-1"])
    wait_until(lambda: "instance-1" in names_in({"x": scrape(pool)["distkv_steps"]}))
    assert value(pool, "distkv_refused_channels", instance="instance-1") == 0


def knock(cluster: LocalCluster, member: str, rank: int) -> None:
    """Ask for a channel without knowing the pool's secret."""
    with RawPeer(rank_address(cluster.run_dir, member, rank)) as stranger:
        stranger.shake_hands(hello(pool=cluster.config.ledger.pool), secret=b"another")


def test_every_rank_that_refuses_a_channel_is_counted(many_ranks: LocalCluster) -> None:
    # Given an instance of two ranks that has nothing to do
    # When strangers knock at both, then /metrics says how often, and where
    wrong = {"instance": "instance-0", "reason": "secret"}
    knock(many_ranks, "instance-0", rank=1)
    wait_until(lambda: value(many_ranks, "distkv_refused_channels", rank="1", **wrong) == 1)
    assert value(many_ranks, "distkv_refused_channels", rank="0", **wrong) == 0
    knock(many_ranks, "instance-0", rank=0)
    wait_until(lambda: value(many_ranks, "distkv_refused_channels", rank="0", **wrong) == 1)
    assert value(many_ranks, "distkv_refused_channels", rank="1", **wrong) == 1
    # And a rank tells no more than it has counted itself
    assert value(many_ranks, "distkv_steps", rank="1") == 0


def test_lenders_are_counted_like_instances_and_gone_when_they_are_gone(many_ranks: LocalCluster) -> None:
    # Given a request that is longer than its instance: it borrows of the lender
    with openai_client(many_ranks) as api:
        prompt = [5 + i % 200 for i in range(150)]
        api.completions.create(model="distkv", prompt=prompt, max_tokens=20, extra_body={"ignore_eos": True})
    wait_until(lambda: value(many_ranks, "distkv_loans_ended", instance="lender-0") >= 1)
    assert value(many_ranks, "distkv_loans_made", instance="lender-0") >= 1

    # And when a stranger knocks at the lender, then the alarm is there, under the lender's name alone
    knock(many_ranks, "lender-0", 0)
    wait_until(lambda: value(many_ranks, "distkv_refused_channels", instance="lender-0", reason="secret") == 1)

    # And when the lender is killed, then no series of its is left; when it comes back, it begins anew
    many_ranks.kill("lender-0")
    wait_until(lambda: "lender-0" not in names_in(scrape(many_ranks)))
    many_ranks.restart("lender-0")
    many_ranks.wait_for(["lender-0"])
    wait_until(lambda: "lender-0" in names_in(scrape(many_ranks)))
    assert value(many_ranks, "distkv_refused_channels", instance="lender-0") == 0


def names_in(families: dict[str, Metric]) -> set[str]:
    return {x.labels["instance"] for family in families.values() for x in family.samples if "instance" in x.labels}
