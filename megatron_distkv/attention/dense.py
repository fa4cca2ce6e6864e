"""Causal attention over whole sequences in one process, with autograd: training without context parallelism."""

import torch
import torch.nn.functional as F

from megatron_distkv.messages import Scoring


def dense_attention(
    q_SBHD: torch.Tensor, k_SBKD: torch.Tensor, v_SBKD: torch.Tensor, scale: float, scoring: Scoring
) -> torch.Tensor:
    """`[S, B, H, D]`. `scale` holds, whatever `scoring` says of it."""
    # torch's CPU flash kernel is ten times as fast on repeated heads as with enable_gqa.
    group = q_SBHD.shape[2] // k_SBKD.shape[2]
    q, k, v = (
        x.permute(1, 2, 0, 3) for x in (q_SBHD, k_SBKD.repeat_interleave(group, 2), v_SBKD.repeat_interleave(group, 2))
    )
    num_tokens, window = len(q_SBHD), scoring.window
    is_plain = window is None or window >= num_tokens
    if scoring.soft_cap is not None:
        out_BHSD = _capped(q, k, v, scale, scoring.soft_cap, _seen(num_tokens, window, q.device))
    elif is_plain:
        out_BHSD = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    else:
        mask_SS = _seen(num_tokens, window, q.device)
        out_BHSD = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_SS, scale=scale)
    return out_BHSD.permute(2, 0, 1, 3)


def _seen(num_tokens: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Row: query; column: the keys that it sees."""
    causal = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=device).tril()
    return causal if window is None else causal.triu(1 - window)


def _capped(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, soft_cap: float, mask_SS: torch.Tensor
) -> torch.Tensor:
    """torch has no kernel for it: all scores in memory, in fp32."""
    scores = soft_cap * torch.tanh((q @ k.mT).float() * (scale / soft_cap))
    return scores.masked_fill(~mask_SS, float("-inf")).softmax(-1).to(q.dtype) @ v
