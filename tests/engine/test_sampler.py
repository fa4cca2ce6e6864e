"""Sampling against the definitions of top-k, top-p and min-p."""

import torch

from megatron_distkv.engine.sampler import filtered_probabilities, sample
from megatron_distkv.request import Request
from megatron_distkv.sampling_params import SamplingParams

LOGITS = torch.log(torch.tensor([0.5, 0.25, 0.15, 0.06, 0.04]))


def kept(**params: float) -> list[int]:
    return filtered_probabilities(LOGITS, SamplingParams(**params)).nonzero().flatten().tolist()  # type: ignore[arg-type]


def test_filters_keep_what_their_definition_says() -> None:
    assert kept(top_k=2) == [0, 1]
    assert kept(top_p=0.75) == [0, 1]
    assert kept(top_p=0.76) == [0, 1, 2]
    assert kept(min_p=0.2) == [0, 1, 2]
    assert kept() == [0, 1, 2, 3, 4]
    sharp = filtered_probabilities(LOGITS, SamplingParams(temperature=0.5))
    assert torch.allclose(sharp, LOGITS.exp() ** 2 / (LOGITS.exp() ** 2).sum())


def test_draws_follow_the_probabilities() -> None:
    # Given many requests that differ in their seed only
    requests = [Request(str(i), [1], SamplingParams(seed=i)) for i in range(4000)]
    drawn = torch.tensor([token.token_id for token in sample(LOGITS.expand(4000, -1), requests)])
    # Then the frequencies are the probabilities (five standard errors)
    frequency = torch.bincount(drawn, minlength=5) / 4000
    assert ((frequency - LOGITS.exp()).abs() < 5 * (LOGITS.exp() / 4000).sqrt()).all()
