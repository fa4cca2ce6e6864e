"""A checkpoint as a source of slices, and what is made of them: a rank's part, and a filled model."""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from megatron.core import parallel_state
from tqdm import tqdm

from megatron_distkv.config.model import ModelConfig
from megatron_distkv.errors import CheckpointError
from megatron_distkv.model.megatron_gpt import MegatronGPT
from megatron_distkv.model.parameter import Parameter, Range
from megatron_distkv.model.weights.parameters import model_parameters

_WEIGHTS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Source(Protocol):
    """One opened checkpoint; raises CheckpointError, one sentence with file and tensor."""

    def read(self, parameter: Parameter, wanted: Range) -> torch.Tensor:
        """Indices `wanted` along `parameter.dim` of the whole parameter, in the stored dtype."""


def require_weights(dtype: torch.dtype, where: Path, name: str) -> None:
    """Quantised weights without their scales are other numbers: raises CheckpointError instead of reading them so."""
    if dtype not in _WEIGHTS:
        kind = str(dtype).removeprefix("torch.")
        raise CheckpointError(f"{where}: the tensor {name} is {kind}; only fp32, bf16, fp16 and fp64 weights are read")


def rank_part(source: Source, parameter: Parameter, rank: int, size: int) -> torch.Tensor:
    """What tensor-parallel rank `rank` of `size` holds of `parameter`, missing rows of the vocabulary as zeros."""
    parts = [source.read(parameter, wanted) for wanted in parameter.rank_ranges(rank, size)]
    padding = parameter.rank_extent(size) - sum(part.shape[parameter.dim] for part in parts)
    if padding:
        parts.append(parts[0].new_zeros(parameter.shape_of(padding)))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=parameter.dim)


def fill(gpt: MegatronGPT, model: ModelConfig, source: Source) -> None:
    """Copy this rank's part of every parameter into `gpt`, one at a time."""
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    parameters = dict(gpt.named_parameters())
    with torch.no_grad():
        for parameter in with_progress(list(model_parameters(model)), "loading", shown=rank == 0):
            parameters.pop(parameter.name).copy_(rank_part(source, parameter, rank, size))
    if parameters:
        raise CheckpointError(f"the model has parameters that no checkpoint fills: {', '.join(parameters)}")


def check(source: Source, model: ModelConfig) -> None:
    """Read everything once and keep nothing; raises CheckpointError at the first tensor that is missing or damaged."""
    for parameter in with_progress(list(model_parameters(model)), "checking"):
        source.read(parameter, Range(0, parameter.extent))


def with_progress(parameters: list[Parameter], what: str, *, shown: bool = True) -> Iterator[Parameter]:
    """A bar on a terminal, nothing elsewhere."""
    return iter(tqdm(parameters, what, unit="tensor", leave=False, disable=None if shown else True))
