"""A request whose context is exactly what the pool holds."""

from megatron_distkv.engine.llm import LLM
from megatron_distkv.sampling_params import SamplingParams
from tests.conftest import MakeConfig


def test_a_prompt_that_fills_the_pool_to_the_last_slot_is_answered(make_config: MakeConfig) -> None:
    # Given an instance of 4 rBlocks, when prompt and answer need all 32 slots (the last token needs none)
    with LLM(make_config(num_rblocks=4)) as llm:
        for length in (32, 30):
            params = SamplingParams(max_tokens=33 - length, temperature=0.0, ignore_eos=True)
            (answer,) = llm.generate([[5] * length], params)
            # Then it is computed
            assert len(answer.token_ids) == 33 - length
