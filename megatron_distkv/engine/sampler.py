"""Chooses each request's next token from its logits.

The random draw depends on the request's seed and the position alone: the same seed gives the same tokens wherever the
rBlocks lie, whoever else is in the batch, and after a preemption. It is the output of a counter-based generator
(Philox), so every device draws alike.
"""

from collections.abc import Sequence

import torch
from numpy.random import Philox

from megatron_distkv.engine.sampled_token import SampledToken
from megatron_distkv.messages import TokenLogprobs
from megatron_distkv.ops import sample_tokens
from megatron_distkv.request import Request
from megatron_distkv.sampling_params import SamplingParams

_SEED_MASK = (1 << 64) - 1
# Below this a distribution is its maximum, and logits divided by the temperature leave the range of fp32.
_COLDEST = 1e-6


def sample(logits_RV: torch.Tensor, requests: Sequence[Request]) -> list[SampledToken | None]:
    """One token per request; row r of `logits_RV` `[R, vocabulary]` belongs to request r.

    None: a logit of this row is NaN or infinite.
    """
    each = [request.sampling for request in requests]
    token_ids: list[int] = sample_tokens(
        logits_RV,
        torch.tensor([0.0 if x.is_greedy else max(x.temperature, _COLDEST) for x in each]),
        torch.tensor([min(x.top_k, logits_RV.shape[1]) for x in each]),  # a client's number may have any size
        torch.tensor([x.top_p for x in each]),
        torch.tensor([x.min_p for x in each]),
        torch.tensor([0.0 if r.sampling.is_greedy else uniform(r) for r in requests], dtype=torch.float64),
    ).tolist()
    rows = [row for row, x in enumerate(each) if x.logprobs is not None and token_ids[row] >= 0]
    logprobs = dict(zip(rows, _logprobs(logits_RV, rows, token_ids, each), strict=True)) if rows else {}
    return [
        SampledToken(token_id, logprobs.get(row)) if token_id >= 0 else None for row, token_id in enumerate(token_ids)
    ]


def uniform(request: Request) -> float:
    """The draw in [0, 1) that decides the request's next token."""
    bits = Philox(key=request.sampling_seed & _SEED_MASK, counter=request.num_tokens).random_raw()
    return float(bits >> 11) * 2.0**-53


def _logprobs(
    logits_RV: torch.Tensor, rows: list[int], token_ids: list[int], each: Sequence[SamplingParams]
) -> list[TokenLogprobs]:
    """Of these rows, before temperature."""
    logprobs_XV = torch.log_softmax(logits_RV[rows].float(), dim=-1)
    counts = [each[row].logprobs or 0 for row in rows]
    chosen = logprobs_XV[range(len(rows)), [token_ids[row] for row in rows]].tolist()
    top = torch.topk(logprobs_XV, min(max(counts), logits_RV.shape[1]), dim=-1)
    ids, values = top.indices.tolist(), top.values.tolist()
    return [
        TokenLogprobs(chosen=chosen[x], top=list(zip(ids[x][:count], values[x][:count], strict=True)))
        for x, count in enumerate(counts)
    ]
