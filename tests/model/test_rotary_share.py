"""Partial rotation and none at all: the tokens and logprobs of transformers' Llama whose frequencies say the same.

Megatron rotates the first dims of a head, in pairs (i, i + rotated / 2); transformers rotates all, in pairs
(i, i + D / 2). A pair with frequency 0 does not turn: so permuted query and key weights make the two equal.
"""

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from megatron_distkv.cli.main import main
from megatron_distkv.engine.llm import LLM
from megatron_distkv.sampling_params import SamplingParams
from tests.conftest import MakeConfig

HEAD_DIM, BASE = 16, 1000.0
SAMPLING = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True, logprobs=3)


def with_rotary_share(hf: Path, share: float, to: Path) -> Path:
    """The same weights as a Megatron checkpoint whose arguments rotate only `share` of each head."""
    assert main(["convert", str(hf), str(to), "--to", "torch_dist"]) == 0
    (common,) = to.glob("iter_*/common.pt")
    state = torch.load(common, weights_only=False)
    state["args"].rotary_percent = share
    if share == 0:
        state["args"].position_embedding_type = "none"
    torch.save(state, common)
    return to


def transformers_order(rotated: int) -> list[int]:
    """For each dim of a head in transformers' order, the dim of Megatron's that must lie there."""
    half, left = rotated // 2, list(range(rotated, HEAD_DIM))
    middle = len(left) // 2
    return [*range(half), *left[:middle], *range(half, rotated), *left[middle:]]


def reference(hf: Path, rotated: int) -> LlamaForCausalLM:
    model = LlamaForCausalLM.from_pretrained(hf).eval()
    order = torch.tensor(transformers_order(rotated))
    frequencies = torch.zeros(HEAD_DIM // 2)
    frequencies[: rotated // 2] = BASE ** -(torch.arange(0, rotated, 2) / max(rotated, 1))
    model.model.rotary_emb.inv_freq = frequencies
    for layer in model.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            weight = projection.weight.data
            projection.weight.data = weight.view(-1, HEAD_DIM, weight.shape[1])[:, order].reshape(weight.shape)
    return model


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5])
def test_tokens_and_logprobs_are_transformers(
    share: float, llama: Path, tmp_path: Path, make_config: MakeConfig
) -> None:
    # Given prompts that go through chunked prefill, and a model that rotates a share of each head
    checkpoint = with_rotary_share(llama, share, tmp_path / "megatron")
    prompts = [torch.randint(3, 131, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (5, 90)]
    config = make_config(scheduler={"max_batched_tokens": 32}).model_copy(update={"model": checkpoint})
    with LLM(config) as llm:
        completions = llm.generate(prompts, SAMPLING)
    # Then transformers, with the same frequencies, says the same
    model = reference(llama, int(share * HEAD_DIM))
    for prompt, completion in zip(prompts, completions, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion.token_ids])).logits[0, len(prompt) - 1 : -1]
        best = logits.log_softmax(-1).topk(3)
        assert completion.token_ids == best.indices[:, 0].tolist()
        got = torch.tensor([[logprob for _, logprob in x.top] for x in completion.logprobs])
        assert torch.allclose(got, best.values, atol=1e-4)
