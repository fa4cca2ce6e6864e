"""Which token each request gets: its own draws, its own log-probabilities, and its own errors."""

import pytest
import torch

from megatron_distkv.engine.sampler import sample, uniform
from megatron_distkv.request import Request
from megatron_distkv.sampling_params import SamplingParams

LOGITS = torch.log(torch.tensor([0.5, 0.25, 0.15, 0.06, 0.04]))


def request(name: str = "r", **params: object) -> Request:
    return Request(name, [1], SamplingParams(**params))  # type: ignore[arg-type]


def test_draws_follow_the_probabilities() -> None:
    # Given many requests that differ in their seed only
    requests = [request(str(seed), seed=seed) for seed in range(4000)]
    drawn = torch.tensor([token.token_id for token in sample(LOGITS.expand(4000, -1), requests) if token])
    # Then the frequencies are the probabilities (five standard errors)
    frequency = torch.bincount(drawn, minlength=5) / 4000
    assert ((frequency - LOGITS.exp()).abs() < 5 * (LOGITS.exp() / 4000).sqrt()).all()


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    # Given the generator's own definition: Philox 4x64 with the seed as key and the position as counter
    again = Request("other", [9, 9], SamplingParams(seed=7, max_tokens=8), output_token_ids=[4])
    assert uniform(again) == uniform(Request("one", [1, 2, 3], SamplingParams(seed=7)))
    draws = {uniform(Request("r", [1] * n, SamplingParams(seed=seed))) for n in range(1, 30) for seed in (0, 1, -1)}
    assert len(draws) == 3 * 29
    assert all(0 <= draw < 1 for draw in draws)
    # What every device and every release draws
    assert uniform(Request("r", [1], SamplingParams(seed=0))) == 0.5023796042735054


def test_each_request_is_sampled_as_it_asked() -> None:
    asked = [
        request(temperature=0.0),
        request(top_k=1),
        request(logprobs=2, temperature=0.0),
        request(logprobs=0, seed=1),
    ]
    greedy, only, with_two, with_none = sample(LOGITS.expand(4, -1), asked)
    assert greedy is not None
    assert (greedy.token_id, greedy.logprobs) == (0, None)
    assert only is not None
    assert only.token_id == 0
    assert with_two is not None
    assert with_two.logprobs is not None
    assert [token_id for token_id, _ in with_two.logprobs.top] == [0, 1]
    assert [value for _, value in with_two.logprobs.top] == pytest.approx(LOGITS[:2].tolist())
    assert with_none is not None
    assert with_none.logprobs is not None
    assert with_none.logprobs.top == []
    assert with_none.logprobs.chosen == pytest.approx(float(LOGITS[with_none.token_id]))


def test_numbers_of_any_size_end_nobodys_instance() -> None:
    most = (1 << 64) - 1
    strange, other = sample(
        LOGITS.expand(2, -1),
        [request(top_k=most, seed=most, logprobs=20), request(top_p=1e-320, min_p=1e-45, temperature=1e-300)],
    )
    assert strange is not None
    assert strange.logprobs is not None
    assert [token_id for token_id, _ in strange.logprobs.top] == [0, 1, 2, 3, 4]
    assert other is not None
    assert other.token_id == 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_one_requests_own(temperature: float) -> None:
    logits_RV = LOGITS.repeat(3, 1)
    logits_RV[1, 3] = float("nan")
    asked = [request(temperature=temperature, top_k=1, logprobs=1) for _ in range(3)]
    first, bad, last = sample(logits_RV, asked)
    assert bad is None
    assert first is not None
    assert last is not None
    assert first.token_id == last.token_id == 0
