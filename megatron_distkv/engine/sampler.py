"""Chooses each request's next token from its logits.

The random draw depends on the request's seed and the position alone: the same seed gives the same tokens wherever the
rBlocks lie, whoever else is in the batch, and after a preemption.
"""

from collections.abc import Sequence

import torch

from megatron_distkv.engine.sampled_token import SampledToken
from megatron_distkv.messages import TokenLogprobs
from megatron_distkv.request import Request
from megatron_distkv.sampling_params import SamplingParams

# Knuth's multiplicative constant spreads consecutive positions over the seed space.
_POSITION_STRIDE = 0x9E3779B97F4A7C15
_SEED_MASK = (1 << 63) - 1
# Below this a distribution is its maximum, and logits divided by the temperature leave the range of fp32.
_COLDEST = 1e-6


def sample(logits_RV: torch.Tensor, requests: Sequence[Request]) -> list[SampledToken]:
    """One token per request; row r of `logits_RV` `[R, vocabulary]` belongs to request r."""
    logits_RV = logits_RV.float()
    greedy = logits_RV.argmax(dim=-1).tolist()
    tokens = []
    for row, request in enumerate(requests):
        sampling = request.sampling
        token_id = greedy[row] if sampling.is_greedy else _draw(logits_RV[row], request)
        logprobs = None if sampling.logprobs is None else _logprobs(logits_RV[row], token_id, sampling.logprobs)
        tokens.append(SampledToken(token_id, logprobs))
    return tokens


def filtered_probabilities(logits_V: torch.Tensor, sampling: SamplingParams) -> torch.Tensor:
    """Probabilities after temperature, top-k, top-p and min-p, in this order, as vLLM does; sums to 1."""
    logits_V = logits_V / max(sampling.temperature, _COLDEST)
    if 0 < sampling.top_k < logits_V.numel():
        kth = torch.topk(logits_V, sampling.top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < kth, float("-inf"))
    probabilities_V = torch.softmax(logits_V, dim=-1)
    if sampling.top_p < 1.0:
        probabilities_V = _keep_top_p(probabilities_V, sampling.top_p)
    if sampling.min_p > 0.0:
        too_small = probabilities_V < sampling.min_p * probabilities_V.max()
        probabilities_V = probabilities_V.masked_fill(too_small, 0.0)
    return probabilities_V / probabilities_V.sum()


def _keep_top_p(probabilities_V: torch.Tensor, top_p: float) -> torch.Tensor:
    ordered, order = torch.sort(probabilities_V, descending=True, stable=True)
    before = torch.cumsum(ordered, dim=-1) - ordered
    kept = ordered.masked_fill((before >= top_p) & (before > 0.0), 0.0)  # the likeliest stays, however small top_p is
    return torch.zeros_like(probabilities_V).scatter_(0, order, kept)


def _draw(logits_V: torch.Tensor, request: Request) -> int:
    probabilities_V = filtered_probabilities(logits_V, request.sampling)
    seed = (request.sampling_seed + _POSITION_STRIDE * request.num_tokens) & _SEED_MASK
    generator = torch.Generator(device=logits_V.device).manual_seed(seed)
    return int(torch.multinomial(probabilities_V, 1, generator=generator))


def _logprobs(logits_V: torch.Tensor, token_id: int, count: int) -> TokenLogprobs:
    logprobs_V = torch.log_softmax(logits_V, dim=-1)
    top = torch.topk(logprobs_V, count) if count else None
    pairs = list(zip(top.indices.tolist(), top.values.tolist(), strict=True)) if top is not None else []
    return TokenLogprobs(chosen=float(logprobs_V[token_id]), top=pairs)
