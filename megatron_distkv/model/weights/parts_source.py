"""Checkpoints of one state dict per tensor-parallel rank (Megatron legacy, DeepSpeed), read as whole parameters."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from megatron_distkv.errors import CheckpointError
from megatron_distkv.model.parameter import Parameter, Range, Split
from megatron_distkv.model.weights.source import require_weights


class Part(NamedTuple):
    """One tensor-parallel rank's tensors under Megatron-core's names, and the files that they came from."""

    tensors: Mapping[str, torch.Tensor]
    files: Mapping[str, Path]
    directory: Path

    def file_of(self, name: str) -> Path:
        return self.files.get(name, self.directory)


class PartsSource:
    def __init__(self, parts: list[Part]) -> None:
        self._parts = parts

    def read(self, parameter: Parameter, wanted: Range) -> torch.Tensor:
        """Gather what `wanted` has in common with each rank's ranges, in the order of the whole parameter."""
        size = 1 if parameter.split is Split.WHOLE else len(self._parts)
        found: list[tuple[int, torch.Tensor]] = []
        for rank, part in enumerate(self._parts[:size]):
            tensor = self._tensor(part, parameter, size)
            begin_here = 0
            for held in _held(parameter, tensor.shape[parameter.dim], rank, size):
                low, high = max(wanted.start, held.start), min(wanted.end, held.end)
                if low < high:
                    found.append((low, tensor.narrow(parameter.dim, begin_here + low - held.start, high - low)))
                begin_here += held.extent
        found.sort(key=lambda piece: piece[0])
        pieces = [piece for _, piece in found]
        if not pieces:
            return self._tensor(self._parts[0], parameter, size).narrow(parameter.dim, 0, 0)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=parameter.dim)

    def _tensor(self, part: Part, parameter: Parameter, size: int) -> torch.Tensor:
        name = parameter.name
        if name not in part.tensors:
            raise CheckpointError(f"{part.directory}: the tensor {name} is missing")
        tensor = part.tensors[name]
        require_weights(tensor.dtype, part.file_of(name), name)
        wanted = parameter.shape_of(parameter.rank_extent(size))
        found = tuple(tensor.shape)
        is_padded = parameter.split is Split.VOCABULARY and found[:1] >= wanted[:1] and found[1:] == wanted[1:]
        if found != wanted and not is_padded:
            raise CheckpointError(
                f"{part.file_of(name)}: the tensor {name} has shape {found}, one of {size} ranks needs {wanted}"
            )
        return tensor


def _held(parameter: Parameter, num_held: int, rank: int, size: int) -> list[Range]:
    """Vocabularies are padded to what their trainer liked, so that only the tensor tells what a rank holds."""
    if parameter.split is not Split.VOCABULARY:
        return parameter.rank_ranges(rank, size)
    extent = parameter.extent
    return [Range(min(rank * num_held, extent), min((rank + 1) * num_held, extent))]
