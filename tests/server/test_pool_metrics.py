"""What /metrics says: nothing of who is gone, counts under their instance's name, and all of it documented."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from megatron_distkv.messages import Counted, InstanceStatus
from megatron_distkv.metrics import INSTANCE_REGISTRY, REGISTRY
from megatron_distkv.server.pool_metrics import PoolMetrics
from tests.server.still_view import member

DOCUMENT = Path(__file__).parents[2] / "docs" / "metrics.md"


def status(instance: str, *counted: Counted) -> InstanceStatus:
    return InstanceStatus(
        query_id=0, instance_id=instance, num_running=0, num_waiting=0, free_rblocks=1, used_rblocks=0, lent_rblocks=0,
        borrowed_rblocks=0, num_steps=0, num_preemptions=0, num_computed_tokens=0, counted=list(counted),
    )  # fmt: skip


def families() -> Iterator[Metric]:
    yield from REGISTRY.collect()
    yield from PoolMetrics([], []).collect()


def full_name(family: Metric) -> str:
    """As it is scraped."""
    return f"{family.name}_total" if family.type == "counter" else family.name


def test_counts_of_instances_are_counters_with_their_names() -> None:
    # Given two instances that have counted, one of them something that this version does not know
    steps = "distkv_steps_total"
    refused = Counted("distkv_refused_channels_total", {"reason": "secret"}, 3.0)
    follower = Counted("distkv_refused_channels_total", {"reason": "secret", "instance": "another"}, 4.0, rank=1)
    told = [
        status("a", Counted(steps, {}, 7.0), refused, follower, Counted("distkv_of_the_future_total", {}, 1.0)),
        status("b", Counted(steps, {}, 9.0)),
    ]
    # And a lender, which tells the ledger
    lender = replace(member("l", total=4), counted=(refused,))
    # When they are scraped
    text = generate_latest(PoolMetrics([lender], told)).decode()
    read = {family.name: family for family in text_string_to_metric_families(text)}
    # Then a reader of Prometheus' format finds counters, labelled by instance and rank
    assert read["distkv_steps"].type == "counter"
    assert {x.labels["instance"]: x.value for x in read["distkv_steps"].samples} == {"a": 7.0, "b": 9.0}
    assert [(x.labels, x.value) for x in read["distkv_refused_channels"].samples] == [
        ({"instance": "a", "rank": "0", "reason": "secret"}, 3.0),
        ({"instance": "a", "rank": "1", "reason": "secret"}, 4.0),
        ({"instance": "l", "rank": "0", "reason": "secret"}, 3.0),
    ]
    assert "future" not in text


def test_names_follow_the_conventions_and_no_two_are_the_same() -> None:
    names = [full_name(family) for family in families()]
    assert len(names) == len(set(names))
    assert all(re.fullmatch(r"distkv_[a-z_]+", name) for name in names)
    assert not any(name.endswith("_total_total") for name in names)


def test_every_metric_is_documented_as_it_is() -> None:
    # Given the tables of the document, and those that the definitions give
    written = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("| `distkv_")]
    expected = [f"| `{full_name(x)}` | {x.type} | {x.documentation} |" for x in families()]
    # Then they are the same, line by line (copy the missing ones)
    assert [line for line in expected if line not in written] == []
    assert [line for line in written if line not in expected] == []


@pytest.mark.parametrize("registry", [REGISTRY, INSTANCE_REGISTRY])
def test_no_label_names_a_request_or_a_member(registry: CollectorRegistry) -> None:
    samples = [sample for family in registry.collect() for sample in family.samples]
    assert not [x for x in samples if {"request", "request_id", "creditor", "debtor", "instance"} & x.labels.keys()]
