"""What a training step is given, wherever it comes from."""

from typing import NamedTuple, Protocol

import torch


class MicroBatch(NamedTuple):
    """What one forward pass computes: B rows of T tokens, whole, though a context group shares them.

    `weights_BT` says what each label counts: the step's loss is the sum over all its micro-batches on all data-parallel
    ranks. Documents begin at `document_starts` in every row. `temperature` multiplies attention scores.
    """

    inputs_BT: torch.Tensor
    labels_BT: torch.Tensor
    weights_BT: torch.Tensor
    document_starts: tuple[int, ...] = (0,)
    temperature: float = 1.0


class BatchSource(Protocol):
    """A function of text, seed and step alone: a resumed run sees what it would have seen, on any layout."""

    def num_micro_batches(self, dp_size: int) -> int:
        """Of each rank and step; raises ConfigError when so many ranks cannot share a step."""
        ...

    def micro_batches(self, step: int, dp_rank: int, dp_size: int) -> list[MicroBatch]: ...
