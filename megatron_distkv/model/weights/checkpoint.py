"""Which checkpoint a directory holds, whoever wrote it on however many ranks."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from megatron_distkv.config.model import ModelConfig
from megatron_distkv.errors import CheckpointError
from megatron_distkv.log import get_logger
from megatron_distkv.model.families import family_of
from megatron_distkv.model.megatron_gpt import MegatronGPT
from megatron_distkv.model.weights import deepspeed, hf, hf_config, legacy, torch_dist
from megatron_distkv.model.weights.dist_source import DistSource
from megatron_distkv.model.weights.source import Source, fill

logger = get_logger(__name__)


class CheckpointFormat(StrEnum):
    HF = "hf"
    TORCH_DIST = "torch_dist"
    LEGACY = "legacy"
    DEEPSPEED = "deepspeed"


@dataclass(frozen=True)
class Checkpoint:
    """`directory` is where the tensors lie (for Megatron and DeepSpeed the iteration's own folder)."""

    format: CheckpointFormat
    directory: Path
    model: ModelConfig
    step: int | None = None
    parallelism: str = ""
    """Of the ranks that wrote it, in words; empty for Hugging Face."""

    def text_directories(self) -> list[Path]:
        """Where its tokenizer may lie: beside Hugging Face's tensors, above the iterations of others."""
        if self.format is CheckpointFormat.HF:
            return [self.directory]
        return [self.directory.parent, self.directory.parent.parent]

    def __str__(self) -> str:
        notes = [family_of(self.model).name, self.parallelism, "" if self.step is None else f"step {self.step}"]
        return f"{self.format.value} checkpoint {self.directory} ({', '.join(note for note in notes if note)})"


def find_checkpoint(path: Path) -> Checkpoint:
    """Look at `path` without reading tensors; raises CheckpointError, one sentence."""
    if not path.is_dir():
        raise CheckpointError(f"no checkpoint at {path}: the directory does not exist")
    if (path / "config.json").exists():
        return Checkpoint(CheckpointFormat.HF, path, hf_config.read_config(path))
    found = _megatron(path) or _deepspeed(path)
    if found is not None:
        return found
    raise CheckpointError(
        f"{path} holds no checkpoint that can be read: no config.json (Hugging Face), no"
        " latest_checkpointed_iteration.txt, metadata.json or mp_rank_00 (Megatron),"
        " no latest or mp_rank_00_model_states.pt (DeepSpeed)"
    )


def _megatron(path: Path) -> Checkpoint | None:
    found = torch_dist.find_iteration(path)
    if found is None:
        return None
    directory, step = found
    if (directory / "metadata.json").exists():
        model, words = torch_dist.read_config(directory), torch_dist.parallelism(directory)
        return Checkpoint(CheckpointFormat.TORCH_DIST, directory, model, step, words)
    layout = legacy.read_layout(directory)
    words = f"TP {layout.tensor_parallel}, PP {layout.stages}"
    return Checkpoint(CheckpointFormat.LEGACY, directory, legacy.read_config(directory), step, words)


def _deepspeed(path: Path) -> Checkpoint | None:
    tag = deepspeed.find_tag(path)
    if tag is None:
        return None
    layout = deepspeed.read_layout(tag)
    words = f"TP {layout.tensor_parallel}, DP {layout.data_parallel}, ZeRO {layout.zero_stage}"
    return Checkpoint(CheckpointFormat.DEEPSPEED, tag, deepspeed.read_config(tag), deepspeed.step_of(tag), words)


def load_weights(gpt: MegatronGPT, checkpoint: Checkpoint, model: ModelConfig) -> None:
    """Fill `gpt`, built from `model`, with this rank's slices; raises CheckpointError naming file and tensor."""
    logger.info("loading %s", checkpoint)
    fill(gpt, model, open_source(checkpoint, model))


def open_source(checkpoint: Checkpoint, model: ModelConfig) -> Source:
    """The checkpoint's tensors, to be read as parts of `model`."""
    match checkpoint.format:
        case CheckpointFormat.HF:
            return hf.HfSource(checkpoint.directory, model)
        case CheckpointFormat.TORCH_DIST:
            return DistSource(checkpoint.directory, model)
        case CheckpointFormat.LEGACY:
            return legacy.open_legacy(checkpoint.directory)
        case CheckpointFormat.DEEPSPEED:
            return deepspeed.open_deepspeed(checkpoint.directory)
