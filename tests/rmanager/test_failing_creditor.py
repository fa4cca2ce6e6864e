"""A creditor that lives but cannot do what it is asked: its debtors go on."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import torch

from megatron_distkv.engine.llm import LLM
from megatron_distkv.ledger.embedded_server import EmbeddedServer
from megatron_distkv.sampling_params import SamplingParams
from tests.conftest import MakeConfig

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
PROMPT = torch.randint(3, 131, (180,), generator=torch.Generator().manual_seed(3)).tolist()


@pytest.fixture
def pool(make_config: MakeConfig, server: EmbeddedServer) -> Iterator[dict[str, LLM]]:
    """c has the most free memory, so it is asked first."""
    ledger = {"url": server.url, "heartbeat_interval_s": 0.1, "lease_s": 1.0}
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(LLM(make_config(name, num_rblocks=size, ledger=ledger)))
            for name, size in (("a", 16), ("b", 32), ("c", 64))
        }


def fails(*_: object) -> None:
    raise RuntimeError("one of its ranks is gone")


@pytest.mark.parametrize("what", ["lending.lend", "lending.release", "rank.creditor.store", "rank.creditor.query"])
def test_its_debtor_goes_on(
    what: str, pool: dict[str, LLM], make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given the tokens of an instance with enough memory, and a creditor that answers one question with an error
    with LLM(make_config("enough")) as enough:
        (expected,) = enough.generate([PROMPT], GREEDY)
    *path, method = what.split(".")
    owner = pool["c"].instance.parts
    for part in path:
        owner = getattr(owner, part)
    monkeypatch.setattr(owner, method, fails)

    # When a needs memory of others
    (completion,) = pool["a"].generate([PROMPT], GREEDY)

    # Then it gets its tokens
    assert completion.token_ids == expected.token_ids
    assert pool["a"].instance.status(0).borrowed_rblocks == 0
