"""Batches of passkeys: a function of text, seed and step alone, so that a resumed run sees what it would have seen."""

from typing import NamedTuple

import numpy as np
import torch

from megatron_distkv.config.train import PasskeyDataConfig
from megatron_distkv.training.batch import MicroBatch
from megatron_distkv.training.loss import token_weights
from megatron_distkv.training.passkey import Bytes, training_batch


class Batch(NamedTuple):
    """One data-parallel rank's rows of a step; `temperature` is the same on all ranks."""

    inputs_BT: torch.Tensor
    labels_BT: torch.Tensor
    is_answer_BT: torch.Tensor
    temperature: float


class PasskeyData:
    def __init__(self, config: PasskeyDataConfig, prose: Bytes, seed: int) -> None:
        self._config = config
        self._prose = prose
        self._seed = seed

    def batch(self, step: int, dp_rank: int, dp_size: int) -> Batch:
        """Rows `dp_rank, dp_rank + dp_size, ...` of the step's global batch."""
        stage = self._config.stage(step)
        rng = np.random.default_rng((self._seed, step))
        fitting = self._config.tokens_per_step // stage.sequence_length // dp_size
        num_rows = max(self._config.gradient_accumulation_steps, fitting) * dp_size
        temperature = float(rng.uniform(stage.min_temperature, 1.0))
        ids, is_answer = training_batch(rng, self._prose, num_rows, stage.sequence_length, stage.max_density)
        mine_ids, mine_answer = torch.from_numpy(ids[dp_rank::dp_size]), torch.from_numpy(is_answer[dp_rank::dp_size])
        return Batch(mine_ids[:, :-1], mine_ids[:, 1:], mine_answer[:, 1:], temperature)

    def num_micro_batches(self, dp_size: int) -> int:
        return self._config.gradient_accumulation_steps

    def micro_batches(self, step: int, dp_rank: int, dp_size: int) -> list[MicroBatch]:
        inputs_BT, labels_BT, is_answer_BT, temperature = self.batch(step, dp_rank, dp_size)
        weights_BT = token_weights(is_answer_BT, self._config.prose_weight) / dp_size
        count = self._config.gradient_accumulation_steps
        parts = zip(*(x.tensor_split(count) for x in (inputs_BT, labels_BT, weights_BT)), strict=True)
        return [MicroBatch(inputs, labels, weights, (0,), temperature) for inputs, labels, weights in parts]
