"""A lost creditor costs its part of a request's prefill, not all of it; tokens and logprobs stay the same."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
import torch

from megatron_distkv.engine.batch import StepPlan
from megatron_distkv.engine.llm import LLM
from megatron_distkv.engine.model_runner import StepResult
from megatron_distkv.ledger.embedded_server import EmbeddedServer
from megatron_distkv.messages import TokenLogprobs
from megatron_distkv.request import Request
from megatron_distkv.sampling_params import SamplingParams
from tests.conftest import MakeConfig

NAMES = ("a", "b", "c", "d")
RBLOCK_SIZE = 8
Check = Callable[[], None]
SAMPLED = SamplingParams(max_tokens=16, temperature=0.8, top_p=0.9, seed=11, logprobs=2, ignore_eos=True)


@pytest.fixture
def pool(make_config: MakeConfig, server: EmbeddedServer) -> Iterator[dict[str, LLM]]:
    """Four instances of 16 rBlocks (128 tokens) each."""
    with ExitStack() as stack:
        rooms = {"url": server.url, "num_rblocks": 16, "scheduler": {"max_batched_tokens": 48}}
        yield {name: stack.enter_context(LLM(make_config(name, **rooms))) for name in NAMES}


class Run:
    """One request in a, step by step, with everything that its client would see."""

    def __init__(self, pool: dict[str, LLM], prompt: list[int]) -> None:
        self.pool = pool
        self.a = pool["a"].instance
        self.request = Request("r", prompt, SAMPLED)
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.a.add(self.request)

    def step(self) -> None:
        for output in self.a.step():
            self.token_ids += output.token_ids
            self.logprobs += output.logprobs or []

    def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            assert not self.a.scheduler.is_idle, "the request ended too early for this test"
            self.step()

    def finish(self) -> None:
        while not self.a.scheduler.is_idle:
            self.step()

    def rblocks_at(self, creditor: str) -> int:
        if self.request.num_computed_tokens == 0:
            return 0
        return self.a.rmanager.table(self.request).remote_by_creditor().get(creditor, 0)

    def cut(self, creditor: str) -> None:
        """Break all channels that others have to this instance, for good."""
        self.pool[creditor].instance.parts.listeners.close()

    def creditors(self) -> list[str]:
        return list(self.a.rmanager.table(self.request).remote_by_creditor())


@pytest.fixture
def run(pool: dict[str, LLM]) -> Run:
    return Run(pool, torch.randint(3, 131, (200,), generator=torch.Generator().manual_seed(3)).tolist())


@pytest.fixture
def assert_nobody_could_tell(run: Run, make_config: MakeConfig) -> Check:
    """The request's tokens and logprobs are those of one instance with enough memory; nothing is owed."""

    def check() -> None:
        with LLM(make_config("enough", num_rblocks=256)) as enough:
            expected = enough.generate([run.request.prompt_token_ids], SAMPLED)[0]
        assert run.token_ids == expected.token_ids
        for got, wanted in zip(run.logprobs, expected.logprobs, strict=True):
            assert got.chosen == pytest.approx(wanted.chosen, abs=1e-4)
        assert run.request.num_preemptions == 0
        run.a.step()
        run.a.check_integrity()
        assert run.a.status(0).free_rblocks == 16
        assert run.a.status(0).borrowed_rblocks == 0

    return check


def test_only_what_the_lost_creditor_held_is_computed_again(run: Run, assert_nobody_could_tell: Check) -> None:
    run.until(lambda: len(run.token_ids) == 4)
    creditor = run.creditors()[0]
    lost = run.rblocks_at(creditor)
    assert 0 < lost * RBLOCK_SIZE < len(run.request.prompt_token_ids)
    run.cut(creditor)
    run.finish()
    assert run.request.num_recomputed_tokens == lost * RBLOCK_SIZE
    assert_nobody_could_tell()


def test_two_creditors_lost_at_once(run: Run, assert_nobody_could_tell: Check) -> None:
    # Given a request whose rBlocks lie in at least two other instances
    run.until(lambda: len(run.token_ids) == 4)
    while len(run.creditors()) < 2:  # one may have been free enough for all of it
        run.a.rmanager.begin_step()
        run.a.rmanager.move_to("r", 4, next(name for name in NAMES[1:] if name not in run.creditors()))
        run.step()
    both = run.creditors()[:2]
    assert len(both) == 2
    lost = sum(run.rblocks_at(creditor) for creditor in both)
    # When both are lost in one step
    for creditor in both:
        run.cut(creditor)
    run.finish()
    # Then what lay at both is computed again, once
    assert run.request.num_recomputed_tokens == lost * RBLOCK_SIZE
    assert_nobody_could_tell()


def test_a_creditor_lost_in_prefill(run: Run, assert_nobody_could_tell: Check) -> None:
    # Given a prompt of which a part has moved out while the rest is not computed
    run.until(lambda: any(run.rblocks_at(creditor) for creditor in NAMES[1:]))
    assert run.request.num_computed_tokens < len(run.request.prompt_token_ids)
    run.cut(run.creditors()[0])
    run.finish()
    assert 0 < run.request.num_recomputed_tokens < len(run.request.prompt_token_ids)
    assert_nobody_could_tell()


@pytest.mark.parametrize("way", ["there", "home"])
def test_a_creditor_lost_while_rblocks_travel(
    way: str, run: Run, monkeypatch: pytest.MonkeyPatch, assert_nobody_could_tell: Check
) -> None:
    # Given rBlocks on their way to a creditor whom one of this step's moves is for, or on their way back
    lost: list[str] = []
    runner = run.a.parts.rank.runner
    compute = runner.run

    def lose_on_the_way(plan: StepPlan) -> StepResult:
        travelling = plan.moves if way == "there" else plan.pulls
        if travelling and not lost and run.rblocks_at(travelling[0].creditor):
            lost.append(travelling[0].creditor)
            run.cut(lost[0])
        return compute(plan)

    run.until(lambda: len(run.token_ids) == (0 if way == "there" else 4))
    # When it is lost before they have arrived
    monkeypatch.setattr(runner, "run", lose_on_the_way)
    if way == "home":
        run.pool[run.creditors()[0]].instance.rmanager.ask_back_all()
        until_s = time.monotonic() + 10.0
        while run.a.parts.membership.orders.empty():  # of the recall it hears with its next report
            assert time.monotonic() < until_s
            time.sleep(0.01)
    run.finish()
    # Then a part of the request is computed again
    assert lost
    assert 0 < run.request.num_recomputed_tokens < len(run.request.prompt_token_ids)
    assert_nobody_could_tell()


def test_a_second_creditor_lost_while_the_first_loss_is_recovered(run: Run, assert_nobody_could_tell: Check) -> None:
    run.until(lambda: len(run.token_ids) == 4)
    first = run.creditors()[0]
    run.cut(first)
    run.until(lambda: bool(run.request.lost_ranges))
    # When rBlocks have moved to another creditor to make room for the lost ones, and that is lost too
    run.until(lambda: any(creditor != first for creditor in run.creditors()))
    before = run.request.num_recomputed_tokens
    run.cut(next(creditor for creditor in run.creditors() if creditor != first))
    run.finish()
    assert run.request.num_recomputed_tokens > before
    assert_nobody_could_tell()
