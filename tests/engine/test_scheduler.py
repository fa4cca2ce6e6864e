"""What the scheduler does with requests that get no room."""

from types import SimpleNamespace

import pytest

from megatron_distkv.engine import scheduler
from megatron_distkv.engine.llm import LLM
from megatron_distkv.rblock import LoanId
from megatron_distkv.request import Request
from megatron_distkv.sampling_params import SamplingParams
from tests.conftest import MakeConfig

GREEDY = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)


def test_a_request_keeps_the_patience_that_it_drew(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given a running request whose instance has lent the rest of its memory, and a long patience drawn first
    draws = iter([1.0, *[0.0] * 1000])
    now_s = 0.0
    monkeypatch.setattr(scheduler, "random", SimpleNamespace(random=lambda: next(draws)))
    monkeypatch.setattr(scheduler, "time", SimpleNamespace(monotonic=lambda: now_s))
    with LLM(make_config(num_rblocks=16, scheduler={"max_batched_tokens": 8})) as llm:
        request = Request("one", [5] * 100, GREEDY, arrival_s=0.0)
        llm.instance.add(request)
        llm.instance.step()
        assert llm.instance._allocator.lend(LoanId("all"), 14) is not None

        # When no room comes
        while request.num_preemptions == 0:
            now_s += 0.1
            llm.instance.step()

        # Then it has given up after the long patience, not after the shortest of all draws
        assert now_s > 2 * scheduler.GIVE_UP_AFTER_S
