"""Angles of the rotary position embedding, from each token's own position."""

import math
from functools import lru_cache
from typing import NamedTuple

import torch

from megatron_distkv.config.model import RopeScaling


class RotaryConfig(NamedTuple):
    """`percent` of each head's dims are rotated (0: no position information at all), `base` is theta."""

    percent: float = 1.0
    base: float = 10000.0
    scaling: RopeScaling | None = None

    def rotated_dims(self, head_dim: int) -> int:
        return int(head_dim * self.percent) // 2 * 2


class RotaryTable(NamedTuple):
    """cos and sin `[T, rotated dims]`, fp32, the two halves equal."""

    cos_TR: torch.Tensor
    sin_TR: torch.Tensor


def rotary_table(positions_T: torch.Tensor, rotary: RotaryConfig, head_dim: int) -> RotaryTable:
    """Angles in float64, so that positions beyond 2^20 keep their fraction."""
    frequencies = rotary_frequencies(rotary, head_dim).to(positions_T.device)
    angles = torch.outer(positions_T.to(torch.float64), frequencies)
    angles = torch.cat((angles, angles), dim=-1)
    factor = 1.0 if rotary.scaling is None else rotary.scaling.attention_factor
    return RotaryTable((angles.cos() * factor).float(), (angles.sin() * factor).float())


@lru_cache(maxsize=8)
def rotary_frequencies(rotary: RotaryConfig, head_dim: int) -> torch.Tensor:
    """Radians per token `[rotated dims / 2]`, float64, falling."""
    rotated = rotary.rotated_dims(head_dim)
    frequencies = rotary.base ** -(torch.arange(0, rotated, 2, dtype=torch.float64) / rotated)
    scaling = rotary.scaling
    if scaling is None:
        return frequencies
    stretched = frequencies / scaling.factor
    if scaling.kind == "linear":
        return stretched
    kept = _llama3_ramp(frequencies, scaling) if scaling.kind == "llama3" else _yarn_ramp(rotated, rotary.base, scaling)
    return torch.lerp(stretched, frequencies, kept)


def _llama3_ramp(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """How much of each frequency stays as it is, 0 .. 1, by its turns in the original context (Llama 3.1's code)."""
    turns = scaling.original_context_tokens * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    return ((turns - low) / (high - low)).clamp(0, 1)


def _yarn_ramp(rotated: int, base: float, scaling: RopeScaling) -> torch.Tensor:
    """The same after YaRN (arXiv 2309.00071), whose ramp is linear in the dim's number."""

    def dim_that_turns(times: float) -> float:
        return rotated * math.log(scaling.original_context_tokens / (times * 2 * math.pi)) / (2 * math.log(base))

    low, high = dim_that_turns(scaling.beta_fast), dim_that_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotated - 1)
    dims = torch.arange(rotated // 2, dtype=torch.float64)
    return 1 - ((dims - low) / max(high - low, 0.001)).clamp(0, 1)
