"""Passkey recall of the model in training, on held-out prose."""

import numpy as np
import torch
from megatron.core.models.gpt import GPTModel

from megatron_distkv.model.parallel import gather_vocabulary
from megatron_distkv.training.passkey import NUM_DIGITS, Bytes, prompt


@torch.no_grad()
def recall(gpt: GPTModel, held_out: Bytes, length: int, num_prompts: int, seed: int) -> float:
    """Share of prompts whose digits are all the likeliest next tokens: what greedy decoding would answer."""
    rng = np.random.default_rng(seed)
    num_right = 0
    for depth in np.linspace(0.05, 0.95, num_prompts):
        asked = prompt(rng, held_out, length, float(depth))
        ids_1T = torch.tensor([[*asked.token_ids, *asked.digits]])
        logits_1TV = gpt(ids_1T[:, :-1], None, None)
        likeliest = gather_vocabulary(logits_1TV[0, -NUM_DIGITS:]).argmax(-1)
        num_right += int(torch.equal(likeliest, ids_1T[0, -NUM_DIGITS:]))
    return num_right / num_prompts
