"""`deterministic`: the same bits alone, among others, wherever rBlocks lie, and after a loss."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_distkv.engine.llm import LLM
from megatron_distkv.errors import ConfigError
from megatron_distkv.ledger.embedded_server import EmbeddedServer
from megatron_distkv.messages import TokenLogprobs
from megatron_distkv.ops import use_backend
from megatron_distkv.request import Request
from megatron_distkv.sampling_params import SamplingParams
from tests.conftest import MakeConfig
from tests.model.families import save_family

SAMPLING = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True, logprobs=3)
Answer = tuple[list[int], list[TokenLogprobs]]
generator = torch.Generator().manual_seed(3)
PROMPT = torch.randint(3, 131, (300,), generator=generator).tolist()
OTHERS = [torch.randint(3, 131, (n,), generator=generator).tolist() for n in (5, 61, 130)]


class Pool:
    """One that answers with ample memory, and more of them, small or otherwise, on one ledger."""

    def __init__(self, stack: ExitStack, make_config: MakeConfig, url: str, kv: str = "auto", **same: Any) -> None:
        self._stack, self._make_config, self._kv, self._same = stack, make_config, kv, same
        self._ledger = {"url": url, "heartbeat_interval_s": 0.1, "lease_s": 30.0}

    def start(self, name: str, num_rblocks: int, num_host: int = 0, tokens: int = 64, **rooms: Any) -> LLM:
        cache = {"num_rblocks": num_rblocks, "num_host_rblocks": num_host, "rblock_size": 8, "dtype": self._kv}
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
    small = pool.start("small", 16, tokens=45, lending={"verify_one_in": 4})
    creditors = {name: pool.start(name, 40) for name in ("x", "y", "z")}
    losses = [lambda r: r.num_computed_tokens > 240, lambda r: len(r.output_token_ids) == 8]
    seen: set[str] = set()

    def lose_some(request: Request) -> None:
        if request not in small.instance.scheduler.running:
            return
        held = small.instance.rmanager.table(request).remote_by_creditor()
        seen.update(held)
        if losses and losses[0](request):
            losses.pop(0)
            creditors[max(held, key=lambda name: held[name])].instance.parts.listeners.close()

    found["borrowed, and lost in prefill and again in decode"] = answer(small, during=lose_some)
    assert len(seen) > 1
    assert not losses
    return found


@pytest.mark.parametrize(
    ("family", "same"),
    [
        ("llama", {"dtype": "fp32"}),
        ("llama", {"dtype": "bf16"}),
        ("llama", {"dtype": "fp32", "kv": "int8"}),
        ("qwen3-moe", {"dtype": "fp32"}),  # three of eight experts
        ("qwen2-tied", {"dtype": "fp32"}),
        ("mixtral", {"dtype": "bf16", "kv": "int8"}),  # two of four, behind a window
    ],
    ids=lambda x: x if isinstance(x, str) else " ".join(x.values()),
)
def test_the_bits_of_a_request_are_its_own(
    family: str, same: dict[str, str], pool_of: Callable[..., Pool], llama: Path, tmp_path: Path
) -> None:
    model = llama if family == "llama" else save_family(family, tmp_path / family)
    found = answers_of(pool_of(model=model, deterministic=True, **same))
    assert {way: got == found["alone"] for way, got in found.items()} == dict.fromkeys(found, True)


@pytest.mark.parametrize("kv", ["auto", "int8"])
def test_without_it_they_are_not(kv: str, pool_of: Callable[..., Pool]) -> None:
    """So the test above can fail. (Whether the batch's size alone changes bits is for torch's products to say.)"""
    found = answers_of(pool_of(dtype="fp32", kv=kv))
    assert all(found[way] != found["alone"] for way in found if "host" in way or "borrowed" in way)


def test_other_kernels_are_refused(make_config: MakeConfig) -> None:
    # Given kernels whose bits depend on the batch, as where no C++ compiler was found
    use_backend("reference")
    try:
        # When bits are to be the same, then it is refused, and said what would help
        with pytest.raises(ConfigError, match=r"C\+\+ kernels.*'reference'.*distkv doctor"):
            LLM(make_config("it", deterministic=True))
    finally:
        use_backend("auto")
