"""What attention is outside of serving: over whole sequences, with autograd and without a KV cache."""

from typing import Protocol

import torch

from megatron_distkv.messages import Scoring


class SequenceAttention(Protocol):
    """DenseAttention, or what shares a sequence among ranks."""

    def __hash__(self) -> int:
        """Equal ones have equal positions: their table of angles is kept."""
        ...

    def check_scoring(self, scoring: Scoring) -> None:
        """Raises ConfigError for a way of scoring that it cannot compute."""
        ...

    def positions(self, num_tokens: int) -> torch.Tensor:
        """Of the `num_tokens` rows that `attend` gets, each in its own document: int64."""
        ...

    def attend(
        self, q_SBHD: torch.Tensor, k_SBKD: torch.Tensor, v_SBKD: torch.Tensor, scale: float, scoring: Scoring
    ) -> torch.Tensor:
        """Causal attention of S rotated rows of each of B sequences, `[S, B, H, D]`; `scale` holds, not `scoring`'s."""
        ...
