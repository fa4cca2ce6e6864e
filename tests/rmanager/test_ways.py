"""What the way to a creditor costs: measured once, shown, and used in who is asked and what comes home."""

import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import torch

from megatron_distkv.engine.llm import LLM
from megatron_distkv.kvcache.rblock_shape import RBlockShape
from megatron_distkv.ledger import QUERY_US, WAYS, MemoryLedger, WayCost, read_ways, render_debts, write_ways
from megatron_distkv.ledger.embedded_server import EmbeddedServer
from megatron_distkv.rblock import InstanceId
from megatron_distkv.request import Request
from megatron_distkv.rmanager import Identity, MailboxSizes, Peers, PoolOutlook, Ways
from megatron_distkv.rmanager.ways import measure_way, way_cost
from megatron_distkv.sampling_params import SamplingParams
from tests.conftest import MakeConfig
from tests.rmanager.test_borrowing import random_prompt

SHAPE = RBlockShape(4, 8, 2, 16, 32, "fp32")


class KnownWays(Ways):
    def __init__(self, **costs: WayCost) -> None:
        self._costs = costs


def test_costs_follow_from_round_trip_and_bandwidth() -> None:
    # Given 10 us and 100 bytes per us; a question: 8 heads of 16 numbers of 4 bytes, both ways, and 8 LSE
    cost = way_cost(10.0, 100.0, SHAPE)
    assert cost.ask_us == pytest.approx(4 * (10 + (8 * (16 * 8 + 4)) / 100))
    # And an rBlock: K and V of 4 layers, 2 heads, 32 tokens of 16 numbers
    assert cost.home_us == pytest.approx(2 * 4 * 2 * 32 * 16 * 4 / 100)
    assert cost.break_even_steps == cost.home_us / cost.ask_us


class TimedLine:
    """Calls on it take this long, and longer with a load."""

    def __init__(self, call_s: float, load_s: float) -> None:
        self._call_s, self._load_s = call_s, load_s

    def call(self, _: object, __: bytes, tensors: list[torch.Tensor], *, deadline_s: float) -> None:
        time.sleep(self._call_s + (self._load_s if tensors[0].numel() else 0.0))


def test_a_bandwidth_is_no_larger_than_what_was_seen() -> None:
    # Given a way on which a load of 1 MiB takes no longer than nothing: 2 ms, or a little less by chance
    for load_s in (0.0, -0.001):
        way = measure_way(TimedLine(0.002, load_s), SHAPE, 10.0)  # type: ignore[arg-type]
        # Then it carries at most twice that in that time, where it once was said to carry 10,485,760 MB/s
        assert way.megabytes_per_s <= 2 * 1.048576 / 0.001
    # And where the load is what takes long, its share counts alone
    slow = measure_way(TimedLine(0.002, 0.02), SHAPE, 10.0)  # type: ignore[arg-type]
    assert 5 < slow.megabytes_per_s <= 1.048576 / 0.02


def test_who_is_far_is_asked_last_however_free() -> None:
    # Given two creditors that compute alike, the freer one behind a long way
    ledger, me = MemoryLedger(), Identity(InstanceId("me"))
    for name, free in (("near", 10), ("far", 500)):
        ledger.register(InstanceId(name), name, free, 0, 60.0, info={QUERY_US: "5.0"})
    peers = Peers("pool", me, 0, MailboxSizes(1, 1), deadline_s=1.0)
    ways = KnownWays(near=way_cost(20.0, 5000.0, SHAPE), far=way_cost(2000.0, 100.0, SHAPE))
    outlook = PoolOutlook(ledger, me, peers, enabled=True, ways=ways)
    assert [creditor.instance for creditor in outlook.creditors()] == ["near", "far"]


@pytest.mark.parametrize(
    "said", ["", "nonsense", "[]", '{"b": 3}', '{"b": [1, 2, 3]}', '{"b": [1, 2, 3, NaN]}', '{"b": [1, 2, 3, "4"]}',
             '{"b": [1, 2, 3, -4]}', '{"b": [1, 2, 3, true]}', "[" * 100_000],
)  # fmt: skip
def test_what_cannot_be_read_is_left_out(said: str) -> None:
    assert read_ways(said) == {}


@pytest.fixture
def pair(make_config: MakeConfig, server: EmbeddedServer) -> Iterator[dict[str, LLM]]:
    with ExitStack() as stack:
        yield {name: stack.enter_context(LLM(make_config(name, num_rblocks=16, url=server.url))) for name in ("a", "b")}


def measured(debtor: LLM, creditor: str) -> WayCost:
    end_s = time.monotonic() + 30
    while (way := debtor.instance._ways.of(creditor)) is None:
        assert time.monotonic() < end_s
        time.sleep(0.05)
    return way


def test_members_measure_each_other_once_and_the_ledger_shows_it(pair: dict[str, LLM]) -> None:
    # Given two members
    a = pair["a"].instance
    way = measured(pair["a"], "b")
    assert way.round_trip_us > 0
    assert way.home_us > 0
    # Then it is in the ledger for everybody to see
    measured(pair["b"], "a")
    snapshot = a._ledger.snapshot()
    record = snapshot.find(InstanceId("a"))
    assert record is not None
    assert record.ways["b"].round_trip_us == pytest.approx(way.round_trip_us, rel=0.01)
    shown = render_debts(snapshot)
    assert "a to b" in shown
    assert "steps per rBlock" in shown
    # And it is not measured again
    a._ways.look()
    assert a._ways.of("b") == way


def test_rblocks_come_home_when_it_pays_and_there_is_room(pair: dict[str, LLM], make_config: MakeConfig) -> None:
    # Given two requests of a that do not fit into it together, and a long way to b
    many, few = (SamplingParams(max_tokens=n, temperature=0.0, ignore_eos=True) for n in (50, 12))
    prompts = [random_prompt(70), random_prompt(60, seed=5)]
    with LLM(make_config("enough", num_rblocks=64)) as enough:
        expected = [enough.generate([p], s)[0].token_ids for p, s in zip(prompts, (many, few), strict=True)]
    measured(pair["a"], "b")
    a = pair["a"].instance
    a._ways._costs = {"b": WayCost(1000.0, 1000.0, 1000.0, 10.0)}
    requests = [Request("long", prompts[0], many), Request("short", prompts[1], few)]
    for request in requests:
        a.add(request)

    # When they run, and the shorter one ends
    was_borrowed, at_home_with = 0, 0
    while not a.scheduler.is_idle:
        a.step()
        borrowed = a.status(0).borrowed_rblocks
        was_borrowed = max(was_borrowed, borrowed)
        if was_borrowed and not borrowed and not at_home_with:
            at_home_with = len(requests[0].output_token_ids)

    # Then what had left comes home before the longer one ends, and nothing is computed again
    assert was_borrowed > 0
    assert 0 < at_home_with < 45
    assert [request.output_token_ids for request in requests] == expected
    assert all(request.num_recomputed_tokens == request.num_preemptions == 0 for request in requests)


def test_a_stale_epoch_describes_nothing(server: EmbeddedServer, make_config: MakeConfig) -> None:
    with LLM(make_config("a", url=server.url)) as llm:
        ledger, identity = llm.instance._ledger, llm.instance._rank.identity
        assert not ledger.describe(identity.instance, identity.epoch - 1, {WAYS: "x"})
        assert ledger.describe(identity.instance, identity.epoch, {WAYS: write_ways({"b": WayCost(1, 2, 3, 4)})})
        record = ledger.snapshot().find(identity.instance)
        assert record is not None
        assert record.ways == {"b": WayCost(1, 2, 3, 4)}
