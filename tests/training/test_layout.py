"""Layouts that cannot be are refused before anything starts."""

import subprocess
import sys

import pytest
from pydantic import ValidationError

from megatron_distkv.config.train import TrainConfig
from tests.training.test_deepspeed import VALUES


def test_a_context_group_larger_than_a_sequence_is_refused() -> None:
    assert TrainConfig.model_validate({**VALUES, "context_parallel": 32}).context_parallel == 32
    with pytest.raises(ValidationError, match=r"context_parallel 33 cuts sequences in 66.* some of 64 tokens"):
        TrainConfig.model_validate({**VALUES, "context_parallel": 33})


def test_ranks_that_the_launcher_did_not_start_are_missed() -> None:
    # Given one process
    script = "from megatron_distkv.model import init_tensor_parallel; init_tensor_parallel(1, 2)"
    ended = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=120)
    assert "tensor_parallel 1 x context_parallel 2 does not divide the 1 processes" in ended.stderr
