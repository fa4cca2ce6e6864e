"""A pool that shrinks under a request: it waits for memory for a while, and then ends with one clear error."""

import time
from contextlib import ExitStack

import pytest
import torch

from megatron_distkv.engine import scheduler, unplaceable
from megatron_distkv.engine.instance import Instance
from megatron_distkv.engine.llm import LLM
from megatron_distkv.ledger.embedded_server import EmbeddedServer
from megatron_distkv.messages import RequestRefused
from megatron_distkv.request import FinishReason, Request
from megatron_distkv.sampling_params import SamplingParams
from tests.conftest import MakeConfig
from tests.soon import wait_until

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
PROMPT = torch.randint(3, 131, (150,), generator=torch.Generator().manual_seed(3)).tolist()


@pytest.fixture(autouse=True)
def little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "GIVE_UP_AFTER_S", 0.1)
    monkeypatch.setattr(unplaceable, "PATIENCE_S", 1.0)


def start(make_config: MakeConfig, server: EmbeddedServer, name: str) -> LLM:
    """With 16 rBlocks of 8 tokens."""
    return LLM(make_config(name, num_rblocks=16, url=server.url))


def lose_its_creditor(instance: Instance, creditor: LLM) -> Request:
    """A request in mid-answer, more than the instance holds, whose other half goes away."""
    request = Request("r", PROMPT, GREEDY)
    wait_until(lambda: instance.refuse(request) is None)
    instance.add(request)
    while len(request.output_token_ids) < 3:
        instance.step()
    creditor.__exit__(None, None, None)
    end = time.monotonic() + 10
    while not instance.scheduler.waiting:
        assert time.monotonic() < end
        instance.step()
        assert instance.take_final_notices() == []
    return request


def test_a_request_that_fits_nowhere_any_more_ends(make_config: MakeConfig, server: EmbeddedServer) -> None:
    with start(make_config, server, "a") as a:
        # Given a request that only fits with b's memory, and no b any more
        lose_its_creditor(a.instance, start(make_config, server, "b"))
        # When nobody comes for a while
        notices: list[object] = []
        end = time.monotonic() + 10
        while not notices:
            assert time.monotonic() < end
            a.instance.step()
            notices += a.instance.take_final_notices()
        # Then its client hears why, and nothing stays
        (refused,) = notices
        assert isinstance(refused, RequestRefused)
        assert (refused.request_id, refused.code) == ("r", "too_long")
        assert refused.message == "its 153 tokens no longer fit: the pool has shrunk, and the longest is 128"
        assert a.instance.scheduler.is_idle
        a.instance.check_integrity()
        assert a.instance.status(0).free_rblocks == 16


def test_a_request_that_somebody_comes_for_goes_on(make_config: MakeConfig, server: EmbeddedServer) -> None:
    with LLM(make_config("enough")) as enough:
        expected = enough.generate([PROMPT], GREEDY)[0].token_ids
    with start(make_config, server, "a") as a, ExitStack() as stack:
        request = lose_its_creditor(a.instance, start(make_config, server, "b"))
        # When another joins before the patience is over
        stack.enter_context(start(make_config, server, "c"))
        while request.finish_reason is None:
            a.instance.step()
            assert a.instance.take_final_notices() == []
        assert request.finish_reason is FinishReason.LENGTH
        assert request.output_token_ids == expected
