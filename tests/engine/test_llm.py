"""One instance alone: its tokens are transformers' tokens, in any batch, under pressure, with any sampling."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from megatron_distkv.engine.llm import LLM
from megatron_distkv.errors import UserError
from megatron_distkv.sampling_params import SamplingParams
from tests.conftest import MakeConfig

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)


def random_prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 131, (n,), generator=generator).tolist() for n in lengths]


def transformers_tokens(path: Path, prompt: list[int], count: int) -> list[int]:
    model = LlamaForCausalLM.from_pretrained(path).eval()
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_greedy_tokens_of_a_batch_are_transformers_tokens(llm: LLM, llama: Path) -> None:
    prompts = random_prompts(1, 7, 8, 60, 130)
    completions = llm.generate(prompts, GREEDY)
    for prompt, completion in zip(prompts, completions, strict=True):
        assert completion.token_ids == transformers_tokens(llama, prompt, 12)
        assert completion.finish_reason == "length"


def test_more_requests_than_memory_are_preempted_and_lose_nothing(make_config: MakeConfig, llm: LLM) -> None:
    # Given a pool of 12 rBlocks (96 tokens) and six requests of 30 + 12 tokens that start with little
    prompts = random_prompts(30, 31, 29, 30, 28, 32)
    expected = [completion.token_ids for completion in llm.generate(prompts, GREEDY)]
    long = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    with LLM(make_config("small", num_rblocks=12, scheduler={"max_batched_tokens": 24})) as small:
        tokens = [completion.token_ids for completion in small.generate(prompts, GREEDY)]
        longer = small.generate(prompts, long)
    assert tokens == expected
    assert [x.token_ids for x in longer] == [x.token_ids for x in llm.generate(prompts, long)]


def test_a_seed_gives_the_same_tokens_alone_and_in_a_batch(llm: LLM) -> None:
    prompts = random_prompts(20, 21, 22)
    params = [SamplingParams(max_tokens=10, temperature=1.0, top_p=0.9, seed=s, ignore_eos=True) for s in (1, 2, 3)]
    together = [x.token_ids for x in llm.generate(prompts, params)]
    alone = [llm.generate([p], [s])[0].token_ids for p, s in zip(prompts, params, strict=True)]
    assert together == alone
    other = llm.generate([prompts[0]], SamplingParams(max_tokens=10, temperature=1.0, seed=99, ignore_eos=True))
    assert other[0].token_ids != alone[0]


def test_stop_tokens_and_logprobs(llm: LLM, llama: Path) -> None:
    (prompt,) = random_prompts(25)
    expected = transformers_tokens(llama, prompt, 6)
    params = SamplingParams(max_tokens=6, temperature=0.0, stop_token_ids=(expected[3],), logprobs=3, ignore_eos=True)
    (completion,) = llm.generate([prompt], params)
    assert completion.token_ids == expected[: expected.index(expected[3]) + 1]
    assert completion.finish_reason == "stop"
    for token, logprobs in zip(completion.token_ids, completion.logprobs, strict=True):
        assert logprobs.top[0][0] == token
        assert logprobs.top[0][1] == pytest.approx(logprobs.chosen)
        assert logprobs.top[0][1] >= logprobs.top[1][1] >= logprobs.top[2][1]


def test_a_prompt_that_can_never_fit_is_refused_with_the_longest(llm: LLM) -> None:
    with pytest.raises(UserError, match="the longest that the pool's memory holds now is 512"):
        llm.generate(random_prompts(510), GREEDY)
    with pytest.raises(UserError, match="outside of the vocabulary"):
        llm.generate([[131]], GREEDY)
