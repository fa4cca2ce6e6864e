"""What the links to creditors cost: measured when they are to be used, shown, and used in what is fetched back."""

import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from megatron_distkv.clock import SystemClock
from megatron_distkv.engine.llm import LLM
from megatron_distkv.errors import PeerLost
from megatron_distkv.kvcache.rblock_shape import RBlockShape
from megatron_distkv.ledger import CreditorOffer
from megatron_distkv.ledger.embedded_server import EmbeddedServer
from megatron_distkv.pool import LinkCost, Links, link_cost, picture_of, render_debts
from megatron_distkv.pool.links import MAX_ABSENT, NUM_PROBED
from megatron_distkv.rblock import InstanceId
from megatron_distkv.request import Request
from megatron_distkv.sampling_params import SamplingParams
from tests.conftest import MakeConfig
from tests.ledger.snapshot import snapshot
from tests.rmanager.test_borrowing import random_prompt
from tests.soon import wait_until

SHAPE = RBlockShape(4, 8, 2, 16, 32, "fp32")
COST = LinkCost(10.0, 100.0, 40.0, 8.0)


def creditor(name: str, epoch: int = 1) -> CreditorOffer:
    return CreditorOffer(InstanceId(name), epoch, name, 8)


class Measured:
    """Links that note what is measured and published; `away` cannot be measured."""

    def __init__(self, *away: str) -> None:
        self.asked: list[str] = []
        self.published: dict[str, LinkCost] = {}
        self.away = away
        self.links = Links(SystemClock(seed=1), self._measure, self._publish)

    def _measure(self, creditor: CreditorOffer) -> LinkCost:
        self.asked.append(creditor.instance)
        if creditor.instance in self.away:
            raise PeerLost(creditor.instance, "nobody is there")
        return COST

    def _publish(self, links: dict[str, LinkCost]) -> None:
        self.published = links


def test_costs_follow_from_round_trip_and_bandwidth() -> None:
    # Given 10 us, and 100 bytes per us; a question: 8 heads of 16 numbers of 4 bytes, both ways, and 8 LSE
    cost = link_cost(10e-6, 10e-6 + 1000e-6, 100_000, SHAPE)
    assert cost.ask_us == pytest.approx(4 * (10 + (8 * (16 * 8 + 4)) / 100))
    # And an rBlock: K and V of 4 layers, 2 heads, 32 tokens of 16 numbers
    assert cost.fetch_us == pytest.approx(2 * 4 * 2 * 32 * 16 * 4 / 100)
    assert cost.break_even_steps == cost.fetch_us / cost.ask_us


@pytest.mark.parametrize("loaded_s", [5e-6, 10e-6, 10.0001e-6])
def test_a_load_that_takes_no_time_is_no_endless_bandwidth(loaded_s: float) -> None:
    assert link_cost(10e-6, loaded_s, 1 << 20, SHAPE).megabytes_per_s == pytest.approx(2 * (1 << 20) / loaded_s / 1e6)


def test_a_few_are_measured_and_who_is_to_be_used() -> None:
    # Given a pool of a hundred
    measured, pool = Measured(), [creditor(f"m{number}") for number in range(100)]
    # When links are learned again and again, and two of them are to be used
    for _ in range(3):
        measured.links.learn(pool)
        assert measured.links.are_enough
    assert len(set(measured.asked)) == len(measured.asked) == NUM_PROBED
    measured.links.learn(pool, ["m7", "m8"])
    # Then these are measured too, each once in its life, and what is published stays small
    assert {"m7", "m8"} <= set(measured.asked)
    assert len(measured.asked) <= NUM_PROBED + 2
    assert len(measured.published) <= 8
    measured.links.learn([creditor("m7", epoch=2)], ["m7"])
    assert measured.asked.count("m7") == 2


def test_who_cannot_be_measured_is_not_tried_for_ever() -> None:
    measured = Measured("gone")
    for _ in range(10):
        measured.links.learn([creditor("gone")], ["gone"])
    assert measured.asked == ["gone"] * 3
    assert measured.links.cost_of("gone") is None


def test_members_that_are_gone_are_forgotten() -> None:
    measured = Measured()
    for number in range(10 * MAX_ABSENT):
        measured.links.learn([creditor(f"m{number}")], [f"m{number}"])
    known = [n for n in range(10 * MAX_ABSENT) if measured.links.cost_of(f"m{n}") is not None]
    assert len(known) <= MAX_ABSENT + 1


@pytest.fixture
def pair(make_config: MakeConfig, server: EmbeddedServer) -> Iterator[dict[str, LLM]]:
    with ExitStack() as stack:
        yield {name: stack.enter_context(LLM(make_config(name, num_rblocks=16, url=server.url))) for name in ("a", "b")}


def measured_link(debtor: LLM, creditor: str) -> LinkCost:
    links = debtor.instance.parts.links
    wait_until(lambda: links.cost_of(creditor))
    cost = links.cost_of(creditor)
    assert cost is not None
    return cost


def test_members_of_a_small_pool_measure_each_other_and_the_ledger_shows_it(
    pair: dict[str, LLM], server: EmbeddedServer
) -> None:
    # Given two members
    cost = measured_link(pair["a"], "b")
    assert cost.round_trip_us > 0
    assert cost.fetch_us > 0
    # Then it is in the ledger for everybody to see

    def published() -> LinkCost | None:
        member = picture_of(snapshot(server)).find(InstanceId("a"))
        return member and member.info.links.get("b")

    wait_until(published)
    assert published() == pytest.approx(cost)
    shown = render_debts(picture_of(snapshot(server)))
    assert "a to b" in shown
    assert "steps per rBlock" in shown


def test_rblocks_are_fetched_back_when_it_pays_and_there_is_room(
    pair: dict[str, LLM], make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given two requests of a that do not fit into it together, and a slow link to b
    many, few = (SamplingParams(max_tokens=n, temperature=0.0, ignore_eos=True) for n in (50, 12))
    prompts = [random_prompt(70), random_prompt(60, seed=5)]
    with LLM(make_config("enough", num_rblocks=64)) as enough:
        expected = [enough.generate([p], s)[0].token_ids for p, s in zip(prompts, (many, few), strict=True)]
    a = pair["a"].instance
    monkeypatch.setattr(a.parts.links, "cost_of", lambda _: LinkCost(1000.0, 1000.0, 1000.0, 10.0))
    requests = [Request("long", prompts[0], many), Request("short", prompts[1], few)]
    for request in requests:
        a.add(request)

    # When they run, and the shorter one ends
    was_borrowed, back_with = 0, 0
    while not a.scheduler.is_idle:
        if not requests[1].output_token_ids:
            time.sleep(0.1)  # loans take time, not steps: the longer one must not run away before the shorter one runs
        a.step()
        # What lies there; a loan with nothing in it may stay until its request ends
        running = [request for request in requests if request in a.scheduler.running]
        borrowed = sum(sum(a.rmanager.table(request).remote_by_creditor().values()) for request in running)
        was_borrowed = max(was_borrowed, borrowed)
        if was_borrowed and not borrowed and not back_with:
            back_with = len(requests[0].output_token_ids)

    # Then what had left comes back before the longer one ends, and nothing is computed again
    assert was_borrowed > 0
    assert 0 < back_with < 45
    assert [request.output_token_ids for request in requests] == expected
    assert all(request.num_recomputed_tokens == request.num_preemptions == 0 for request in requests)
