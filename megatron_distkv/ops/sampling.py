"""One token id out of each row of logits, all rows in one call."""

import torch

from megatron_distkv.kernels import cpu, reference
from megatron_distkv.ops.backend import cpu_comes_first


def sample_tokens(
    logits_RV: torch.Tensor,
    temperature_R: torch.Tensor,
    top_k_R: torch.Tensor,
    top_p_R: torch.Tensor,
    min_p_R: torch.Tensor,
    uniform_R: torch.Tensor,
) -> torch.Tensor:
    """Token ids `[R]`, int64; -1 for a row with a logit that is NaN or infinite, which says nothing of other rows.

    Temperature 0: the first of the largest logits. Else a token t is drawn with probability e^(logit / temperature)
    among those that top-k (0: all; ties of the k-th stay), top-p (1: all; of what top-k left, the likeliest stays) and
    min-p (0: all; relative to the likeliest) leave, in this order, as in vLLM: the first at which the sum of
    probabilities, in the order of the vocabulary, exceeds `uniform_R` in [0, 1).

    `temperature_R`, `top_p_R`, `min_p_R` are fp32, `top_k_R` int64, `uniform_R` float64, all of them on the CPU.
    """
    backend = cpu if cpu_comes_first() and cpu.can_serve(logits_RV) else reference
    token_id_R: torch.Tensor = backend.sample(logits_RV, temperature_R, top_k_R, top_p_R, min_p_R, uniform_R)
    return token_id_R
