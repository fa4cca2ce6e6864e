"""What a step does when a creditor is lost in the middle of it."""

import torch

from megatron_distkv.engine.addresses import rank_address
from megatron_distkv.engine.llm import LLM
from megatron_distkv.ledger.embedded_server import EmbeddedServer
from megatron_distkv.request import Request
from megatron_distkv.sampling_params import SamplingParams
from tests.conftest import MakeConfig
from tests.transport.connections import break_connections

GREEDY = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)


def test_the_rest_of_the_batch_keeps_its_own_tokens(make_config: MakeConfig, server: EmbeddedServer) -> None:
    # Given a batch in a: the oldest request has rBlocks at b, the two younger ones have not
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, 131, (n,), generator=generator).tolist() for n in (150, 7, 9)]
    with LLM(make_config("enough", num_rblocks=256)) as enough:
        expected = [x.token_ids for x in enough.generate(prompts, GREEDY)]
    ledger = {"url": server.url, "heartbeat_interval_s": 0.1, "lease_s": 1.0}
    with LLM(make_config("a", num_rblocks=16, ledger=ledger)) as a, LLM(make_config("b", ledger=ledger)) as b:
        requests = [Request(str(place), prompt, GREEDY) for place, prompt in enumerate(prompts)]
        # One by one: the younger ones might end while the oldest waits for its loan
        for request in requests:
            a.instance.add(request)
            while not request.output_token_ids:
                a.instance.step()
        at_b = a.instance.rmanager.table(requests[0]).remote_by_creditor()["b"]
        assert at_b > 0
        assert not any(a.instance.rmanager.table(request).remote_by_creditor() for request in requests[1:])

        # When b's channel breaks, and the step that notices means nothing to the oldest request
        break_connections(rank_address(b.instance.config.run_dir, "b", 0))
        while not a.instance.scheduler.is_idle:
            a.instance.step()

        # Then all have their tokens
        assert requests[0].num_preemptions == 0
        # What lay there, and what that step had moved there; not the rest of the prompt
        assert at_b * 8 <= requests[0].num_recomputed_tokens < 150
        assert [request.output_token_ids for request in requests] == expected
