"""A debtor hears that its creditor is busy: KV comes home where there is room for it, or it waits."""

from collections.abc import Callable

import pytest
import torch

from megatron_distkv.engine.llm import LLM
from megatron_distkv.ledger.embedded_server import EmbeddedServer
from megatron_distkv.request import Request
from megatron_distkv.rmanager.backpressure import PATIENCE_STEPS, Backpressure
from megatron_distkv.sampling_params import SamplingParams
from tests.conftest import MakeConfig

GREEDY = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)


def test_only_a_creditor_that_presses_on_end_is_left() -> None:
    pressure = Backpressure()
    rounds = [pressure.note({"b": 0.5, "c": 0.01}, 1.0) for _ in range(PATIENCE_STEPS - 1)]
    assert not any(rounds)
    assert pressure.note({"b": 0.0}, 1.0) == []  # a step without it
    rounds = [pressure.note({"b": 0.5}, 1.0) for _ in range(PATIENCE_STEPS)]
    assert rounds == [[]] * (PATIENCE_STEPS - 1) + [["b"]]
    assert pressure.note({"b": 0.5}, 1.0) == []  # told once, until it goes on for as long again


@pytest.mark.parametrize("has_room", [True, False])
def test_a_busy_creditors_debtor_brings_kv_home_where_there_is_room(
    has_room: bool, make_config: MakeConfig, server: EmbeddedServer
) -> None:
    # Given a request in a, some of whose rBlocks have gone to b, and room for them in a, or none
    prompt = torch.randint(3, 131, (60,), generator=torch.Generator().manual_seed(3)).tolist()
    with LLM(make_config("enough", num_rblocks=64)) as enough:
        (expected,) = enough.generate([prompt], GREEDY)
    rooms = {"url": server.url, "lending": {"max_step_share": 0.003}}
    with LLM(make_config("a", num_rblocks=64 if has_room else 10, **rooms)) as a, LLM(make_config("b", **rooms)) as b:
        request = Request("r", prompt, GREEDY)
        a.instance.add(request)

        def run(until: Callable[[], bool]) -> None:
            while not until():
                assert request.finish_reason is None, "the request ended too early for this test"
                a.instance.step()

        run(lambda: len(request.output_token_ids) >= 2)
        a.instance.rmanager.move_to("r", 3, "b")
        run(lambda: a.instance.rmanager.table(request).remote_by_creditor().get("b", 0) >= 3)
        # When b computes for itself without end
        with b.instance.parts.rank.limiter.own_work():
            run(lambda: len(request.output_token_ids) >= (50 if has_room else 25))
        # Then what lay there has come home, or waits; and the tokens are the same
        assert (a.instance.status(0).borrowed_rblocks == 0) == has_room
        while request.finish_reason is None:
            a.instance.step()
        assert request.output_token_ids == expected.token_ids
        assert request.num_recomputed_tokens == 0
