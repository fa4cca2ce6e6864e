"""What is lent is recalled where that lets a request run, and only there: a debtor computes again what it has lost."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from megatron_distkv.engine.llm import LLM
from megatron_distkv.ledger.embedded_server import EmbeddedServer
from megatron_distkv.request import Request
from megatron_distkv.sampling_params import SamplingParams
from tests.conftest import MakeConfig
from tests.rmanager.test_borrowing import random_prompt
from tests.soon import wait_until

Pair = dict[str, LLM]


@pytest.fixture
def pair(make_config: MakeConfig, server: EmbeddedServer) -> Iterator[Pair]:
    """Two instances of 16 rBlocks (128 tokens), which lend 14 each; a recall costs the debtor what it holds."""
    with ExitStack() as stack:
        settings = {
            "num_rblocks": 16,
            "url": server.url,
            "scheduler": {"max_batched_tokens": 48},
            "lending": {"recall_patience_s": 0.0},
        }
        pair = {name: stack.enter_context(LLM(make_config(name, **settings))) for name in ("a", "b")}
        for llm in pair.values():
            wait_until(lambda llm=llm: llm.instance.rmanager.longest_context_tokens() == 30 * 8)  # type: ignore[misc]
        yield pair


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)


def borrowing(pair: Pair) -> Request:
    """Of b, and computed beyond what fits there."""
    request = Request("lent to", random_prompt(170), greedy(60))
    b = pair["b"].instance
    b.add(request)
    wait_until(lambda: b.step() is not None and b.status(0).borrowed_rblocks > 5 and request.num_to_compute == 1)
    return request


@pytest.mark.parametrize(("num_tokens", "is_recalled"), [(220, False), (110, True)])
def test_only_what_lets_a_request_run_is_recalled(pair: Pair, num_tokens: int, is_recalled: bool) -> None:
    # Given a request of b that holds rBlocks of a
    lent_to, a, b = borrowing(pair), pair["a"].instance, pair["b"].instance
    wait_until(lambda: a.parts.candidates.borrowable_rblocks == 0)  # it has heard that b lends nothing

    # When one comes to a that its whole pool would hold, or would not
    waiting = Request("waiting", random_prompt(num_tokens, seed=4), greedy(8))
    a.add(waiting)

    def both_have_ended() -> bool:
        a.step()
        b.step()
        return waiting.finish_reason is not None and lent_to.finish_reason is not None

    wait_until(both_have_ended)

    # Then b's computes again only where a's could run at once for it
    assert (lent_to.num_recomputed_tokens > 0) == is_recalled
    assert waiting.num_recomputed_tokens == 0
