"""`kv_cache.dtype: int8`: near the model's dtype, the same wherever it lies, and half the memory."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from megatron_distkv.config.lender import LenderConfig
from megatron_distkv.engine.lender import Lender, num_rblocks_to_lend
from megatron_distkv.engine.llm import LLM, Completion
from megatron_distkv.kvcache.rblock_pool import rank_pool
from megatron_distkv.kvcache.rblock_shape import RBlockShape
from megatron_distkv.ledger.embedded_server import EmbeddedServer
from megatron_distkv.ledger.opening import open_ledger
from megatron_distkv.messages import HandedOver, TokenLogprobs
from megatron_distkv.request import Request
from megatron_distkv.sampling_params import SamplingParams
from tests.conftest import MakeConfig

GREEDY = SamplingParams(max_tokens=24, temperature=0.0, logprobs=2, ignore_eos=True)
NEXT = SamplingParams(max_tokens=1, temperature=0.0, logprobs=1, ignore_eos=True)
RBLOCK_SIZE = 8


def random_prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 131, (n,), generator=generator).tolist() for n in lengths]


def cache(num_rblocks: int, **more: Any) -> dict[str, Any]:
    return {"num_rblocks": num_rblocks, "rblock_size": RBLOCK_SIZE, "dtype": "int8", **more}


@pytest.fixture
def expected(make_config: MakeConfig) -> Callable[[list[int]], Completion]:
    """Of one instance with enough memory, and an int8 cache."""

    def complete(prompt: list[int]) -> Completion:
        with LLM(make_config("enough", kv_cache=cache(256))) as enough:
            return enough.generate([prompt], GREEDY)[0]

    return complete


def finish(llm: LLM, request: Request, until: Callable[[], bool] = lambda: False) -> Completion:
    got = Completion()
    while not llm.instance.is_idle and not until():
        for output in llm.instance.step():
            assert output.request_id == request.request_id
            got.add(output)
    return got


def assert_same(token_ids: list[int], logprobs: list[TokenLogprobs], expected: Completion) -> None:
    assert token_ids == expected.token_ids
    for got, wanted in zip(logprobs, expected.logprobs, strict=True):
        assert got.chosen == pytest.approx(wanted.chosen, abs=1e-4)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_next_token_is_near_that_of_the_models_dtype(dtype: str, make_config: MakeConfig) -> None:
    # Given prompts of many lengths
    prompts = random_prompts(*range(9, 199, 6))
    completions = []
    for kv in ({"num_rblocks": 640, "rblock_size": RBLOCK_SIZE}, cache(640)):
        with LLM(make_config("a", kv_cache=kv, dtype=dtype)) as llm:
            completions.append(llm.generate(prompts, NEXT))
    # When K and V are kept in int8, then hardly any most likely token is another, and none far less likely
    pairs = list(zip(*completions, strict=True))
    assert sum(one.token_ids == int8.token_ids for one, int8 in pairs) >= 0.9 * len(prompts)
    errors = torch.tensor([abs(one.logprobs[0].chosen - int8.logprobs[0].chosen) for one, int8 in pairs])
    assert 0 < errors.mean() < 0.03
    assert errors.max() < 0.15


@pytest.mark.parametrize("max_batched_tokens", [5, 48])
def test_steps_of_any_size_host_memory_and_preemption_change_nothing(
    max_batched_tokens: int, make_config: MakeConfig, expected: Callable[[list[int]], Completion]
) -> None:
    prompts = random_prompts(61, 90, 10, 120, 75)
    scheduler = {"max_batched_tokens": max_batched_tokens}
    with LLM(make_config("a", kv_cache=cache(16, num_host_rblocks=5), scheduler=scheduler)) as a:
        completions = a.generate(prompts, GREEDY)
        a.instance.check_integrity()
        assert a.instance.status(0).free_rblocks == 16
    for prompt, completion in zip(prompts, completions, strict=True):
        assert_same(completion.token_ids, completion.logprobs, expected(prompt))


@pytest.mark.parametrize("when", ["prefill", "decode"])
def test_what_lies_with_lenders_is_checked_lost_and_computed_again(
    when: str,
    make_config: MakeConfig,
    server: EmbeddedServer,
    tmp_path: Path,
    expected: Callable[[list[int]], Completion],
) -> None:
    # Given an instance of 128 tokens that has all answers of creditors computed again, and two lenders
    ledger = {"url": server.url, "heartbeat_interval_s": 0.1, "lease_s": 2.0}
    scheduler = {"max_batched_tokens": 13 if when == "prefill" else 48}
    config = make_config("a", kv_cache=cache(16), ledger=ledger, scheduler=scheduler, lending={"verify_one_in": 1})
    (prompt,) = random_prompts(350)
    with LLM(config) as a:
        lenders = {}
        for name in ("c", "d"):
            values = {"lender_id": name, "run_dir": tmp_path, "num_rblocks": 40, "ledger": ledger}
            shape = a.instance.parts.rank.shape
            lenders[name] = Lender(LenderConfig.model_validate(values), shape, open_ledger(server.url, "default"))
        time.sleep(0.3)  # longer than the instance's view of the pool lasts
        request = Request("long", prompt, GREEDY)
        a.instance.add(request)
        # When the one that holds most is lost: in prefill while a step leaves an open rBlock for the next one
        got = finish(
            a,
            request,
            until=lambda: (
                len(request.output_token_ids) == 4
                if when == "decode"
                else request.num_computed_tokens > 250 and request.num_computed_tokens % RBLOCK_SIZE == 5
            ),
        )
        held = a.instance.rmanager.table(request).remote_by_creditor()
        lost = max(held, key=held.__getitem__)
        lenders[lost].close()
        rest = finish(a, request)
        # Then what it held is computed again, and the open rBlock, and nobody can tell from the tokens
        num_lost = held[lost] * RBLOCK_SIZE
        assert num_lost <= request.num_recomputed_tokens < num_lost + RBLOCK_SIZE
        assert when == "decode" or request.num_recomputed_tokens == num_lost + 5
        assert_same(got.token_ids + rest.token_ids, got.logprobs + rest.logprobs, expected(prompt))
        a.instance.check_integrity()
        (other,) = lenders.keys() - {lost}
        lenders[other].close()


def test_a_request_that_is_handed_over_leaves_only_its_open_rblock_behind(
    make_config: MakeConfig, server: EmbeddedServer, expected: Callable[[list[int]], Completion]
) -> None:
    # Given a request in d, half of its rBlocks with c
    rooms = {"url": server.url, "scheduler": {"max_batched_tokens": 48}, "kv_cache": cache(16)}
    (prompt,) = random_prompts(131)
    with (
        LLM(make_config("d", **rooms)) as d,
        LLM(make_config("s", **{**rooms, "kv_cache": cache(24)})) as s,
        LLM(make_config("c", **rooms)),
    ):
        request = Request("r", prompt, GREEDY)
        d.instance.add(request)
        got = finish(d, request, until=lambda: len(request.output_token_ids) == 6)
        assert d.instance.rmanager.table(request).remote_by_creditor()
        # When d leaves
        d.instance.drain(within_s=60)
        notices = []
        while not notices:
            for output in d.instance.step():
                got.add(output)
            notices = d.instance.take_final_notices()
            time.sleep(0.02)  # or it would be done before anybody has answered anything
        (notice,) = notices
        assert isinstance(notice, HandedOver)
        successor = {"s": s}[notice.successor]
        request = Request("r2", prompt, GREEDY, output_token_ids=list(got.token_ids))
        assert successor.instance.receive(request, notice.handover_id)
        # Then the successor goes on from its last full rBlock
        assert request.num_computed_tokens % RBLOCK_SIZE == 0
        assert 0 < len(prompt) + len(got.token_ids) - request.num_computed_tokens <= RBLOCK_SIZE
        rest = finish(successor, request)
        assert request.num_recomputed_tokens < RBLOCK_SIZE
        assert_same(got.token_ids + rest.token_ids, got.logprobs + rest.logprobs, expected(prompt))
        for llm in (d, s):
            llm.instance.step()
            llm.instance.check_integrity()


@pytest.mark.parametrize(("dtype", "times"), [("bf16", 1.9), ("fp32", 3.8)])
def test_the_same_memory_holds_more(dtype: Literal["bf16", "fp32"], times: float, tmp_path: Path) -> None:
    shape = RBlockShape(4, 8, 2, 128, 64, dtype)
    int8 = RBlockShape(4, 8, 2, 128, 64, dtype, kv_dtype="int8")
    config = LenderConfig.model_validate({"run_dir": tmp_path, "memory": "1GiB"})
    assert num_rblocks_to_lend(config, int8) >= times * num_rblocks_to_lend(config, shape)
    for each in (shape, int8):
        pool = rank_pool(each, 3)
        assert pool.tensor_BLK2ND.nbytes == 3 * pool.rblock_bytes == 3 * each.rblock_bytes


def test_sizes_that_scales_cannot_lie_behind_are_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="int8 need an even rblock_size or head_dim"):
        RBlockShape(2, 4, 2, 15, 7, "fp32", kv_dtype="int8")
