"""Learning rate by step: linear warm-up, then a cosine down to a share of the peak."""

import math

from megatron_distkv.config.train import OptimizerConfig


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    cosine = 0.5 * (1 + math.cos(math.pi * (step + 1) / steps))
    low = config.min_learning_rate_share
    return config.learning_rate * warm * (low + (1 - low) * cosine)
