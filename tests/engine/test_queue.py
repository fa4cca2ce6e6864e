"""The bounded queue and the order of service."""

from megatron_distkv.engine.llm import LLM
from megatron_distkv.request import Request
from megatron_distkv.sampling_params import SamplingParams
from tests.conftest import MakeConfig


def test_one_request_too_many_is_refused_and_the_others_end(make_config: MakeConfig) -> None:
    # Given an instance that runs one request at a time and lets two wait
    limits = {"max_running_requests": 1, "max_waiting_requests": 2, "max_batched_tokens": 16}
    params = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
    with LLM(make_config(scheduler=limits)) as llm:
        instance = llm.instance
        for number in range(3):
            request = Request(str(number), [5, 6, 7], params)
            assert instance.refuse(request) is None
            instance.add(request)
        # When a fourth comes
        refused = instance.refuse(Request("one too many", [5, 6, 7], params))
        # Then it is refused by name, and the three end
        assert refused is not None
        assert refused.code == "queue_full"
        outputs = []
        while not instance.scheduler.is_idle:
            outputs += instance.step()
        assert sum(len(output.token_ids) for output in outputs) == 9


def test_decodes_go_on_while_a_long_prompt_is_computed_in_chunks(make_config: MakeConfig) -> None:
    # Given a running decode, and a prompt of many chunks behind it
    params = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)
    with LLM(make_config(scheduler={"max_batched_tokens": 16})) as llm:
        instance = llm.instance
        instance.add(Request("decode", [5, 6, 7], params))
        instance.step()
        instance.add(Request("prompt", [9] * 150, params))
        # When ten steps are done, then the decode has ten tokens more, and the prompt is on its way
        outputs = [output for _ in range(10) for output in instance.step()]
        assert [output.request_id for output in outputs].count("decode") == 10
        prompt = instance.scheduler.find("prompt")
        assert prompt is not None
        assert 0 < prompt.num_computed_tokens <= 150
