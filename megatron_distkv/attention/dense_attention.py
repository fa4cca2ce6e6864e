"""Causal attention over whole sequences in one process, with autograd: training without context parallelism."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from megatron_distkv.messages import Scoring


@dataclass(frozen=True)
class DenseAttention:
    """Contract: sequence_attention.SequenceAttention. Every row is of one document, from position 0 on."""

    def check_scoring(self, scoring: Scoring) -> None:
        """It knows them all."""

    def positions(self, num_tokens: int) -> torch.Tensor:
        return torch.arange(num_tokens)

    def attend(
        self, q_SBHD: torch.Tensor, k_SBKD: torch.Tensor, v_SBKD: torch.Tensor, scale: float, scoring: Scoring
    ) -> torch.Tensor:
        # torch's CPU flash kernel is ten times as fast on repeated heads as with enable_gqa.
        group = q_SBHD.shape[2] // k_SBKD.shape[2]
        wide_k, wide_v = (x.repeat_interleave(group, 2) for x in (k_SBKD, v_SBKD))
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q_SBHD, wide_k, wide_v))
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
