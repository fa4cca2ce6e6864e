"""Write a checkpoint of any source in any format that we write."""

from pathlib import Path

from megatron_distkv.config.model import ModelConfig
from megatron_distkv.errors import CheckpointError
from megatron_distkv.model.gpt import TORCH_DTYPES
from megatron_distkv.model.weights.checkpoint import CheckpointFormat
from megatron_distkv.model.weights.dist_writer import write_torch_dist
from megatron_distkv.model.weights.hf_writer import write_hf
from megatron_distkv.model.weights.legacy import write_legacy
from megatron_distkv.model.weights.source import Source


def write_checkpoint(
    source: Source,
    model: ModelConfig,
    to: CheckpointFormat,
    path: Path,
    *,
    iteration: int = 0,
    tensor_parallel: int = 1,
) -> Path:
    """Below `path`, in the model's dtype; returns the folder with the tensors."""
    dtype = TORCH_DTYPES[model.dtype]
    match to:
        case CheckpointFormat.HF:
            return write_hf(source, model, dtype, path)
        case CheckpointFormat.TORCH_DIST:
            return write_torch_dist(source, model, dtype, path, iteration, tensor_parallel)
        case CheckpointFormat.LEGACY:
            return write_legacy(source, model, dtype, path, iteration, tensor_parallel)
    raise CheckpointError(f"{to.value} checkpoints are written by DeepSpeed itself only")
