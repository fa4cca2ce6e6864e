"""The learning rate against torch's own cosine."""

import pytest
import torch

from megatron_distkv.config.train import OptimizerConfig
from megatron_distkv.training.schedule import learning_rate

STEPS = 40


def test_after_a_linear_warm_up_it_is_torchs_cosine() -> None:
    config = OptimizerConfig(learning_rate=0.5, min_learning_rate_share=0.2, warmup_steps=8)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS, eta_min=0.1)
    for step in range(STEPS):
        optimizer.step()
        cosine.step()
        warm = min(1.0, (step + 1) / 8)
        assert learning_rate(step, STEPS, config) == pytest.approx(warm * optimizer.param_groups[0]["lr"])
    # Then it ends at its lowest
    assert learning_rate(STEPS - 1, STEPS, config) == pytest.approx(0.1)
