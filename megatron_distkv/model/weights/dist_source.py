"""Megatron's torch_dist checkpoints, read slice by slice: no model, no process group, no unpickling of objects.

Megatron stores equal parameters of all layers under one key with the layer as first dimension, or each layer by itself;
the norms of its local spec lie under the names that Transformer Engine gives them.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_distkv.config.model import ModelConfig
from megatron_distkv.errors import CheckpointError
from megatron_distkv.model.parameter import Parameter, Range, Split
from megatron_distkv.model.weights.dist_index import DistIndex
from megatron_distkv.model.weights.safe_load import load_piece
from megatron_distkv.model.weights.source import require_weights

_STORED_NAMES = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


class Stored(NamedTuple):
    """A parameter's key in torch_dist, and its place in the key's leading dimensions: layer, expert, or none."""

    key: str
    lead: tuple[int, ...]
    lead_sizes: tuple[int, ...]


def stored_names(name: str, model: ModelConfig) -> list[Stored]:
    """Where a parameter may lie, the usual place first."""
    if not name.startswith("decoder.layers."):
        return [Stored(name, (), ())]
    _, _, layer, rest = name.split(".", 3)
    expert: tuple[int, ...] = ()
    expert_sizes: tuple[int, ...] = ()
    if model.mixture is not None and ".local_experts." in rest:
        _, _, _, number, rest = rest.split(".", 4)
        rest, expert, expert_sizes = f"mlp.experts.experts.{rest}", (int(number),), (model.mixture.num_experts,)
    rests = [_STORED_NAMES[rest], rest] if rest in _STORED_NAMES else [rest]
    together = [Stored(f"decoder.layers.{x}", (int(layer), *expert), (model.num_layers, *expert_sizes)) for x in rests]
    return together + [Stored(f"decoder.layers.{layer}.{x}", expert, expert_sizes) for x in rests]


class DistSource:
    def __init__(self, directory: Path, model: ModelConfig) -> None:
        self._directory = directory
        self._model = model
        self._index = DistIndex(directory)

    def read(self, parameter: Parameter, wanted: Range) -> torch.Tensor:
        stored = self._find(parameter)
        metadata: TensorStorageMetadata = self._index.tensors[stored.key]
        self._check_shape(parameter, stored, tuple(metadata.size))
        require_weights(metadata.properties.dtype, self._directory, stored.key)
        lead = len(stored.lead)
        result = torch.empty(parameter.shape_of(wanted.extent), dtype=metadata.properties.dtype)
        num_copied = 0
        for chunk in metadata.chunks:
            begin, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
            place = tuple(index - first for index, first in zip(stored.lead, begin, strict=False))
            if not all(0 <= index < size for index, size in zip(place, sizes, strict=False)):
                continue
            into, out_of = _overlap(parameter, wanted, begin[lead:], sizes[lead:])
            if into is None:
                continue
            piece = self._piece(stored.key, chunk.offsets, sizes)
            result[into] = piece[place][out_of] if place else piece[out_of]
            num_copied += result[into].numel()
        if num_copied != result.numel():
            raise CheckpointError(f"{self._directory}: the tensor {stored.key} has pieces missing or twice")
        return result

    def _find(self, parameter: Parameter) -> Stored:
        names = stored_names(parameter.name, self._model)
        for stored in names:
            if isinstance(self._index.tensors.get(stored.key), TensorStorageMetadata):
                return stored
        raise CheckpointError(f"{self._directory}: the tensor {names[0].key} is missing")

    def _check_shape(self, parameter: Parameter, stored: Stored, found: tuple[int, ...]) -> None:
        wanted = (*stored.lead_sizes, *parameter.shape)
        is_padded = parameter.split is Split.VOCABULARY and found[:1] >= wanted[:1] and found[1:] == wanted[1:]
        if found != wanted and not is_padded:
            raise CheckpointError(
                f"{self._directory}: the tensor {stored.key} has shape {found}, the model needs {wanted}"
            )

    def _piece(self, key: str, offsets: torch.Size, sizes: tuple[int, ...]) -> torch.Tensor:
        piece = self._index.read(key, offsets, load_piece)
        if tuple(piece.shape) != sizes:
            path = self._index.file_of(key, offsets)
            raise CheckpointError(f"{path}: a piece of the tensor {key} has shape {tuple(piece.shape)}, not {sizes}")
        return piece


Slices = tuple[slice, ...]


def _overlap(
    parameter: Parameter, wanted: Range, begin: tuple[int, ...], sizes: tuple[int, ...]
) -> tuple[Slices, Slices] | tuple[None, None]:
    """What a piece at `begin` and the wanted slice share: indices into the slice, and into the piece."""
    into, out_of = [], []
    for dim, extent in enumerate(parameter.shape):
        first, last = (wanted.start, wanted.end) if dim == parameter.dim else (0, extent)
        low, high = max(first, begin[dim]), min(last, begin[dim] + sizes[dim])
        if low >= high:
            return None, None
        into.append(slice(low - first, high - first))
        out_of.append(slice(low - begin[dim], high - begin[dim]))
    return tuple(into), tuple(out_of)
