"""Which checkpoint a directory holds."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from megatron.core.models.gpt import GPTModel

from megatron_distkv.config.model import ModelConfig
from megatron_distkv.errors import CheckpointError
from megatron_distkv.model.weights import hf, hf_config, torch_dist
from megatron_distkv.model.weights.dist_source import DistSource
from megatron_distkv.model.weights.source import Source, fill


class CheckpointFormat(StrEnum):
    HF = "hf"
    TORCH_DIST = "torch_dist"


@dataclass(frozen=True)
class Checkpoint:
    """`directory` is where the tensors lie (for Megatron the iteration's own folder)."""

    format: CheckpointFormat
    directory: Path
    model: ModelConfig
    step: int | None = None

    def __str__(self) -> str:
        at = "" if self.step is None else f", step {self.step}"
        return f"{self.format.value} checkpoint {self.directory}{at}"


def find_checkpoint(path: Path) -> Checkpoint:
    """Look at `path` without reading tensors; raises CheckpointError, one sentence."""
    if not path.is_dir():
        raise CheckpointError(f"no checkpoint at {path}: the directory does not exist")
    if (path / "config.json").exists():
        return Checkpoint(CheckpointFormat.HF, path, hf_config.read_config(path))
    found = torch_dist.find_iteration(path)
    if found is not None:
        directory, step = found
        return Checkpoint(CheckpointFormat.TORCH_DIST, directory, torch_dist.read_config(directory), step)
    raise CheckpointError(
        f"{path} holds no checkpoint that can be read: neither config.json (Hugging Face)"
        " nor latest_checkpointed_iteration.txt or metadata.json (Megatron torch_dist)"
    )


def load_weights(gpt: GPTModel, checkpoint: Checkpoint, model: ModelConfig) -> None:
    """Fill `gpt`, built from `model`, with this rank's slices; raises CheckpointError naming file and tensor."""
    fill(gpt, model, open_source(checkpoint, model))


def open_source(checkpoint: Checkpoint, model: ModelConfig) -> Source:
    """The checkpoint's tensors, to be read as parts of `model`."""
    if checkpoint.format is CheckpointFormat.HF:
        return hf.HfSource(checkpoint.directory, model)
    return DistSource(checkpoint.directory, model.num_layers)
