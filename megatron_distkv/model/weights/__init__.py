"""Checkpoints: what a directory holds, reading it into this rank's part of the model, and writing other formats."""

from megatron_distkv.model.weights.checkpoint import (
    Checkpoint,
    CheckpointFormat,
    find_checkpoint,
    load_weights,
    open_source,
)
from megatron_distkv.model.weights.write import write_checkpoint

__all__ = ["Checkpoint", "CheckpointFormat", "find_checkpoint", "load_weights", "open_source", "write_checkpoint"]
