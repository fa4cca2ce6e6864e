"""Angles of the rotary position embedding, from each token's own position."""

from functools import lru_cache
from typing import NamedTuple

import torch


class RotaryConfig(NamedTuple):
    """`percent` of each head's dims are rotated (0: no position information at all), `base` is theta."""

    percent: float = 1.0
    base: float = 10000.0

    def rotated_dims(self, head_dim: int) -> int:
        return int(head_dim * self.percent) // 2 * 2


class RotaryTable(NamedTuple):
    """cos and sin `[T, rotated dims]`, fp32, the two halves equal."""

    cos_TR: torch.Tensor
    sin_TR: torch.Tensor


def rotary_table(positions_T: torch.Tensor, rotary: RotaryConfig, head_dim: int) -> RotaryTable:
    """Angles in float64, so that positions beyond 2^20 keep their fraction."""
    rotated = rotary.rotated_dims(head_dim)
    exponents = torch.arange(0, rotated, 2, dtype=torch.float64, device=positions_T.device) / rotated
    angles = torch.outer(positions_T.to(torch.float64), rotary.base**-exponents)
    angles = torch.cat((angles, angles), dim=-1)
    return RotaryTable(angles.cos().float(), angles.sin().float())


@lru_cache(maxsize=8)
def sequence_table(num_tokens: int, rotary: RotaryConfig, head_dim: int, device: torch.device) -> RotaryTable:
    """Angles of positions `0 .. num_tokens`, for training on whole sequences."""
    return rotary_table(torch.arange(num_tokens, device=device), rotary, head_dim)
