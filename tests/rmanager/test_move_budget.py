"""No thrash: a step moves a bounded number of rBlocks, and what has left does not travel again and again."""

import pytest
import torch

from megatron_distkv.engine.batch import StepPlan
from megatron_distkv.engine.llm import LLM
from megatron_distkv.engine.model_runner import StepResult
from megatron_distkv.ledger.embedded_server import EmbeddedServer
from megatron_distkv.request import Request
from megatron_distkv.sampling_params import SamplingParams
from tests.conftest import MakeConfig

BUDGET = 3


def request(name: str, length: int, max_tokens: int) -> Request:
    prompt = torch.randint(3, 131, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    return Request(name, prompt, SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True))


def test_memory_that_comes_and_goes_moves_nothing_twice(
    make_config: MakeConfig, server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: list[StepPlan] = []
    rooms = {"url": server.url, "lending": {"max_moved_rblocks_per_step": BUDGET}}
    with LLM(make_config("a", num_rblocks=16, **rooms)) as a, LLM(make_config("b", num_rblocks=64, url=server.url)):
        runner = a.instance.parts.rank.runner
        compute = runner.run

        def watch(plan: StepPlan) -> StepResult:
            plans.append(plan)
            return compute(plan)

        monkeypatch.setattr(runner, "run", watch)
        # Given a request that is longer than its instance's memory
        long = request("long", 150, 90)
        a.instance.add(long)
        while len(long.output_token_ids) < 3:
            a.instance.step()
        # When short ones come and go beside it, so that memory is short and free in turn
        for number in range(8):
            short = request(f"short-{number}", 30, 4)
            a.instance.add(short)
            while short.finish_reason is None or a.instance.scheduler.find(short.request_id) is not None:
                a.instance.step()
            for _ in range(4):
                a.instance.step()
        assert long.finish_reason is None
        while long.finish_reason is None:
            a.instance.step()

    # Then no step moves more than its budget, and each rBlock of the long one travels there and back at most once
    moved = [sum(len(x.local_ids) for x in (*plan.moves, *plan.pulls)) for plan in plans]
    assert max(moved) == BUDGET
    left = sum(len(move.local_ids) for plan in plans for move in plan.moves if move.request_id == "long")
    home = sum(len(pull.local_ids) for plan in plans for pull in plan.pulls if pull.request_id == "long")
    assert 4 <= left <= (150 + 90) // 8
    assert home <= left
    assert long.num_recomputed_tokens == 0
