"""An instance's own host memory: used before anything is borrowed, the same tokens, and everything comes back."""

import time
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import torch

from megatron_distkv.engine.llm import LLM
from megatron_distkv.errors import UserError
from megatron_distkv.ledger.embedded_server import EmbeddedServer
from megatron_distkv.pool import picture_of, render_debts
from megatron_distkv.rblock import HOST
from megatron_distkv.request import Request
from megatron_distkv.sampling_params import SamplingParams
from tests.conftest import MakeConfig
from tests.soon import wait_until

GREEDY = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)


def random_prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 131, (n,), generator=generator).tolist() for n in lengths]


def rooms(num_host_rblocks: int, **more: Any) -> dict[str, Any]:
    """A pool of 16 rBlocks (128 tokens), and host memory."""
    cache = {"num_rblocks": 16, "num_host_rblocks": num_host_rblocks, "rblock_size": 8}
    return {"kv_cache": cache, "scheduler": {"max_batched_tokens": 48}, **more}


@pytest.fixture
def enough(make_config: MakeConfig) -> Iterator[LLM]:
    with LLM(make_config("enough", num_rblocks=256)) as llm:
        yield llm


def assert_all_is_free(llm: LLM) -> None:
    status = llm.instance.status(0)
    assert (status.free_rblocks, status.used_host_rblocks, status.borrowed_rblocks) == (16, 0, 0)
    llm.instance.check_integrity()


@pytest.mark.parametrize("lending", [True, False])
def test_a_context_longer_than_the_pool_of_a_lonely_instance(
    lending: bool, make_config: MakeConfig, enough: LLM
) -> None:
    # Given an instance of 128 tokens with host memory for 256 more
    with LLM(make_config("a", **rooms(32, lending={"enabled": lending}))) as a:
        (prompt,) = random_prompts(340)
        request = Request("long", prompt, GREEDY)
        a.instance.add(request)
        while not a.instance.scheduler.is_idle:
            a.instance.step()
        # Then its tokens are right, and what did not fit lay in host memory
        assert request.output_token_ids == enough.generate([prompt], GREEDY)[0].token_ids
        assert request.max_host_rblocks >= (340 + 20) // 8 - 16
        assert request.max_borrowed_rblocks == {}
        assert request.num_recomputed_tokens == 0
        assert_all_is_free(a)
        with pytest.raises(UserError, match=f"the longest that the pool's memory holds now is {(16 + 32) * 8}"):
            a.generate(random_prompts(380), GREEDY)


def test_many_requests_share_host_memory(make_config: MakeConfig, enough: LLM) -> None:
    prompts = random_prompts(60, 90, 10, 120, 75, 33)
    expected = [completion.token_ids for completion in enough.generate(prompts, GREEDY)]
    with LLM(make_config("a", **rooms(9))) as a:
        assert [completion.token_ids for completion in a.generate(prompts, GREEDY)] == expected
        assert_all_is_free(a)


def test_it_comes_after_creditors_where_it_is_much_slower(
    make_config: MakeConfig, server: EmbeddedServer, enough: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    (prompt,) = random_prompts(260)
    ledger = {"url": server.url, "heartbeat_interval_s": 0.1, "lease_s": 1.0}
    b_has = {"kv_cache": {"num_rblocks": 14, "rblock_size": 8}}
    with (
        LLM(make_config("a", **rooms(32, ledger=ledger))) as a,
        LLM(make_config("b", ledger=ledger, **b_has)) as b,
    ):
        # Given an instance whose host memory has measured badly, and a creditor with a little memory
        membership = a.instance.parts.membership
        membership.info = msgspec.structs.replace(membership.info, host_query_us=1e9)
        wait_until(lambda: a.instance.parts.candidates.host_memory_is_slow())
        # When a prompt is longer than the pool
        request = Request("long", prompt, GREEDY)
        a.instance.add(request)
        while not a.instance.scheduler.is_idle:
            time.sleep(0.05)  # a loan takes time, not steps; host memory is there at once
            a.instance.step()
        # Then the creditor's memory is used up before host memory is, and the tokens are right
        assert request.max_borrowed_rblocks["b"] == b.instance.parts.allocator.max_lent == 12
        assert 0 < request.max_host_rblocks < 260 // 8 - 12
        assert request.output_token_ids == enough.generate([prompt], GREEDY)[0].token_ids
        assert_all_is_free(a)


def test_it_is_full_before_anything_is_borrowed_and_outlives_a_lost_creditor(
    make_config: MakeConfig, server: EmbeddedServer, enough: LLM
) -> None:
    (prompt,) = random_prompts(260)
    ledger = {"url": server.url, "heartbeat_interval_s": 0.1, "lease_s": 1.0}
    with (
        LLM(make_config("a", **rooms(6, ledger=ledger))) as a,
        LLM(make_config("b", ledger=ledger)) as b,
        LLM(make_config("c", num_rblocks=32, ledger=ledger)) as c,
    ):
        request = Request("long", prompt, GREEDY)
        a.instance.add(request)
        # Given a request that needs its instance's pool, host memory and a creditor
        while not request.output_token_ids:
            a.instance.step()
            is_there = request in a.instance.scheduler.running
            if is_there and set(a.instance.rmanager.table(request).remote_by_creditor()) - {HOST}:
                assert a.instance.status(0).used_host_rblocks == 6
        held = a.instance.rmanager.table(request).remote_by_creditor()
        assert held[HOST] == 6
        creditor = next(name for name in held if name != HOST)
        # And the ledger shows it
        a.instance.parts.membership.beat()
        assert "6 of 6 used in host memory" in render_debts(picture_of(a.instance.parts.ledger.snapshot()))
        # When the creditor is lost, then only what lay there is computed again
        {"b": b, "c": c}[creditor].instance.parts.listeners.close()
        while not a.instance.scheduler.is_idle:
            a.instance.step()
        lost = held[creditor]
        assert lost * 8 <= request.num_recomputed_tokens <= (lost + 16) * 8  # with what was on its way there
        assert request.output_token_ids == enough.generate([prompt], GREEDY)[0].token_ids
        assert_all_is_free(a)


def test_an_aborted_request_leaves_nothing_there(make_config: MakeConfig) -> None:
    with LLM(make_config("a", **rooms(32))) as a:
        a.instance.add(Request("long", random_prompts(300)[0], GREEDY))
        while a.instance.status(0).used_host_rblocks < 5:
            a.instance.step()
        a.instance.check_integrity()
        a.instance.abort("long")
        assert_all_is_free(a)
