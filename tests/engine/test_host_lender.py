"""Host memory that an instance lends to others: a member of its own, which comes and leaves with the instance."""

import time
from contextlib import ExitStack
from typing import Any

import pytest
import torch

from megatron_distkv.engine.llm import LLM
from megatron_distkv.errors import UserError
from megatron_distkv.ledger.embedded_server import EmbeddedServer
from megatron_distkv.request import Request
from megatron_distkv.sampling_params import SamplingParams
from tests.conftest import MakeConfig
from tests.soon import wait_until

GREEDY = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)


def rooms(url: str, num_lent_host_rblocks: int) -> dict[str, Any]:
    """A pool of 16 rBlocks (128 tokens)."""
    return {
        "kv_cache": {"num_rblocks": 16, "rblock_size": 8, "num_lent_host_rblocks": num_lent_host_rblocks},
        "ledger": {"url": url, "heartbeat_interval_s": 0.1, "lease_s": 2.0},
        "scheduler": {"max_batched_tokens": 48},
    }


@pytest.mark.parametrize("ends", ["in peace", "drained", "lost"])
def test_kv_lies_in_another_instances_host_memory(ends: str, make_config: MakeConfig, server: EmbeddedServer) -> None:
    prompt = torch.randint(3, 131, (230,), generator=torch.Generator().manual_seed(3)).tolist()
    with LLM(make_config("enough", num_rblocks=256)) as enough:
        expected = enough.generate([prompt], GREEDY)[0].token_ids
    # Given an instance of 128 tokens, and one that lends 320 tokens of host memory beside its pool
    with ExitStack() as stack:
        a = stack.enter_context(LLM(make_config("a", **rooms(server.url, 0))))
        b = stack.enter_context(LLM(make_config("b", **rooms(server.url, 40))))
        time.sleep(0.3)  # longer than the instance's view of the pool lasts
        request = Request("long", prompt, GREEDY)
        a.instance.add(request)
        while len(request.output_token_ids) < 4:
            a.instance.step()
        held = a.instance.rmanager.table(request).remote_by_creditor()
        lender = b.instance.parts.host_lender
        assert lender is not None
        assert 0 < held.get("b.host", 0) <= lender.allocator.num_lent  # a little is borrowed ahead
        # And what it counts, it counts with its instance and tells nobody again
        assert not any(record.counted for record in a.instance.parts.ledger.snapshot().instances)
        # When it is told to leave, or is lost, in the middle of it, and others have memory, too
        stack.enter_context(LLM(make_config("d", **rooms(server.url, 40))))
        if ends == "drained":
            b.instance.drain(30.0)
        elif ends == "lost":
            lender.close()
        while not a.instance.scheduler.is_idle:
            a.instance.step()
            if ends == "drained" and b.instance.has_work:
                b.instance.step()
        # Then the tokens are right, and only what was lost was computed again
        assert request.output_token_ids == expected
        if ends == "lost":  # and what was on its way there in the step that noticed
            assert held["b.host"] * 8 <= request.num_recomputed_tokens <= (held["b.host"] + 16) * 8
        else:
            assert request.num_recomputed_tokens == 0
            wait_until(lambda: lender.allocator.num_free == 40)
        if ends == "drained":
            assert b.instance.is_drained
        lender.check_integrity()
        a.instance.check_integrity()
        b.instance.check_integrity()
    # And nobody is left in the pool
    with LLM(make_config("c", **rooms(server.url, 0))) as c:
        assert [record.instance for record in c.instance.parts.ledger.snapshot().live] == ["c"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"lending": {"enabled": False}}, "num_lent_host_rblocks needs lending.enabled"),
        ({"ledger": {"url": "memory://"}}, "num_lent_host_rblocks needs a ledger that others see"),
    ],
)
def test_nobody_to_lend_to_is_a_mistake(changes: dict[str, Any], sentence: str, make_config: MakeConfig) -> None:
    with pytest.raises((UserError, ValueError), match=sentence):
        make_config("a", **{**rooms("redis://127.0.0.1:1", 4), **changes})
