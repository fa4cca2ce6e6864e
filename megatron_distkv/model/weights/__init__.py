"""Checkpoints: what a directory holds, and reading it into this rank's part of the model."""

from megatron_distkv.model.weights.checkpoint import Checkpoint, CheckpointFormat, find_checkpoint, load_weights

__all__ = ["Checkpoint", "CheckpointFormat", "find_checkpoint", "load_weights"]
