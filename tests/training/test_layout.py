"""Layouts that cannot be are refused before anything starts."""

import pytest
from pydantic import ValidationError

from megatron_distkv.config.train import TrainConfig
from tests.training.test_deepspeed import VALUES


def test_a_context_group_larger_than_a_sequence_is_refused() -> None:
    assert TrainConfig.model_validate({**VALUES, "context_parallel": 32}).context_parallel == 32
    with pytest.raises(ValidationError, match=r"context_parallel 33 cuts sequences in 66.* some of 64 tokens"):
        TrainConfig.model_validate({**VALUES, "context_parallel": 33})
