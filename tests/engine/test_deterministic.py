"""`deterministic`: the same bits alone, among others, wherever rBlocks lie, and after a loss."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from megatron_distkv.engine.llm import LLM
from megatron_distkv.ledger.embedded_server import EmbeddedServer
from megatron_distkv.messages import TokenLogprobs
from megatron_distkv.request import Request
from megatron_distkv.sampling_params import SamplingParams
from tests.conftest import MakeConfig

SAMPLING = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True, logprobs=3)
Answer = tuple[list[int], list[TokenLogprobs]]
generator = torch.Generator().manual_seed(3)
PROMPT = torch.randint(3, 131, (300,), generator=generator).tolist()
OTHERS = [torch.randint(3, 131, (n,), generator=generator).tolist() for n in (5, 61, 130)]


class Pool:
    """One that answers with ample memory, and more of them, small or otherwise, on one ledger."""

    def __init__(self, stack: ExitStack, make_config: MakeConfig, url: str, **same: Any) -> None:
        self._stack, self._make_config, self._same = stack, make_config, same
        self._ledger = {"url": url, "heartbeat_interval_s": 0.1, "lease_s": 30.0}

    def start(self, name: str, num_rblocks: int, num_host: int = 0, tokens: int = 64, **rooms: Any) -> LLM:
        cache = {"num_rblocks": num_rblocks, "num_host_rblocks": num_host, "rblock_size": 8}
        rooms = {"kv_cache": cache, "scheduler": {"max_batched_tokens": tokens}, "ledger": self._ledger} | rooms
        return self._stack.enter_context(LLM(self._make_config(name, **rooms, **self._same)))


def answer(llm: LLM, beside: list[list[int]] = [], during: Callable[[Request], None] | None = None) -> Answer:  # noqa: B006
    request, logprobs = Request("it", PROMPT, SAMPLING), []
    llm.instance.add(request)
    for number, prompt in enumerate(beside):
        llm.instance.add(Request(f"other-{number}", prompt, SAMPLING))
    while not llm.instance.scheduler.is_idle:
        for output in llm.instance.step():
            logprobs += (output.logprobs or []) if output.request_id == "it" else []
        if during is not None:
            during(request)
    llm.instance.check_integrity()
    return request.output_token_ids, logprobs


@pytest.fixture
def pool_of(make_config: MakeConfig, server: EmbeddedServer) -> Iterator[Callable[..., Pool]]:
    with ExitStack() as stack:
        yield lambda **same: Pool(stack, make_config, server.url, **same)


def answers_of(pool: Pool) -> dict[str, Answer]:
    """One request's, in all ways."""
    lonely = {"ledger": {"url": "memory://"}}
    ample = pool.start("ample", 128, **lonely)
    found = {"alone": answer(ample), "in a batch": answer(ample, OTHERS)}
    found["in other chunks"] = answer(pool.start("chunks", 128, tokens=23, **lonely))
    found["over host memory"] = answer(pool.start("host", 16, 40, **lonely))
    small = pool.start("small", 16)
    creditors = {name: pool.start(name, 40) for name in ("x", "y")}
    seen: dict[str, int] = {}

    def lose_one(request: Request) -> None:
        if request not in small.instance.scheduler.running:
            return
        held = small.instance.rmanager.table(request).remote_by_creditor()
        seen.update({name: max(seen.get(name, 0), count) for name, count in held.items()})
        if len(request.output_token_ids) == 8 and not request.num_recomputed_tokens:
            creditors[max(held, key=lambda name: held[name])].instance._doors.close()

    found["borrowed from two, one of them lost"] = answer(small, during=lose_one)
    assert len(seen) == 2
    return found


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_bits_of_a_request_are_its_own(dtype: str, pool_of: Callable[..., Pool]) -> None:
    found = answers_of(pool_of(dtype=dtype, deterministic=True))
    assert {way: got == found["alone"] for way, got in found.items()} == dict.fromkeys(found, True)


def test_without_it_they_are_not(pool_of: Callable[..., Pool]) -> None:
    """So the test above can fail. (Whether the batch's size alone changes bits is for torch's products to say.)"""
    found = answers_of(pool_of(dtype="fp32"))
    assert found["over host memory"] != found["alone"] != found["borrowed from two, one of them lost"]


def test_what_it_does_not_go_with_is_refused(make_config: MakeConfig) -> None:
    with pytest.raises(ValidationError, match=r"deterministic does not go with lending\.verify_one_in"):
        make_config(deterministic=True, lending={"verify_one_in": 3})
    with pytest.raises(ValidationError, match=r"deterministic does not go with kv_cache\.dtype int8"):
        make_config(deterministic=True, kv_cache={"dtype": "int8"})
