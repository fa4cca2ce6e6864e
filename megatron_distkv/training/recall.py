"""Passkey recall of the model in training, on held-out prose."""

from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist

from megatron_distkv.context_parallel import ContextShard
from megatron_distkv.model.parallel import gather_vocabulary
from megatron_distkv.training.passkey import NUM_DIGITS, Bytes, Prompt, prompt

# Megatron's GPTModel or an engine around it: (token ids, positions, mask) -> logits of this rank's vocabulary
Model = Callable[[torch.Tensor, None, None], torch.Tensor]


@torch.no_grad()
def recall(
    gpt: Model, held_out: Bytes, length: int, num_prompts: int, seed: int, shard: ContextShard | None = None
) -> float:
    """Share of prompts whose digits are all the likeliest next tokens: what greedy decoding would answer.

    `shard`: this rank's share of `num_inputs(length)` tokens, which the model's attention must know as well.
    """
    rng = np.random.default_rng(seed)
    num_right = 0
    for depth in np.linspace(0.05, 0.95, num_prompts):
        num_wrong = wrong_digits(gpt, prompt(rng, held_out, length, float(depth)), shard)
        if shard is not None and shard.cp_group is not None:
            dist.all_reduce(num_wrong, group=shard.cp_group)
        num_right += int(num_wrong == 0)
    return num_right / num_prompts


def num_inputs(length: int) -> int:
    """Tokens that the model sees of a prompt of `length` tokens: all digits but the last as well."""
    return length + NUM_DIGITS - 1


def wrong_digits(gpt: Model, asked: Prompt, shard: ContextShard | None) -> torch.Tensor:
    """How many of the digits that this rank's tokens are to predict are not the likeliest, int64 without dims."""
    ids_T = torch.tensor([*asked.token_ids, *asked.digits])
    tokens = torch.arange(len(ids_T) - 1) if shard is None else shard.tokens
    logits_TV = gpt(ids_T[tokens][None], None, None)[0]
    is_before_digit_T = tokens >= len(asked.token_ids) - 1
    if not is_before_digit_T.any():
        return torch.zeros((), dtype=torch.int64)
    likeliest = gather_vocabulary(logits_TV[is_before_digit_T]).argmax(-1)
    return (likeliest != ids_T[tokens[is_before_digit_T] + 1]).sum()
