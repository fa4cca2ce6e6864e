"""Hugging Face checkpoints in safetensors, one or many files: only slices are read, whole files are written.

Which tensors make up a parameter of Megatron-core's, the family says (`Family.tensor_names`). Those of several hold:
linear_qkv per KV head [queries.. k v], linear_fc1 [gate; up].
"""

import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from megatron_distkv.config.model import ModelConfig
from megatron_distkv.errors import CheckpointError
from megatron_distkv.model.families import family_of
from megatron_distkv.model.parameter import Parameter, Range
from megatron_distkv.model.weights.source import require_weights

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


class Piece:
    """One Hugging Face tensor of a parameter: `name`, `[num_rows, ...]`."""

    def __init__(self, name: str, num_rows: int) -> None:
        self.name = name
        self.num_rows = num_rows


def pieces(parameter: Parameter, c: ModelConfig) -> list[Piece]:
    """The Hugging Face tensors that make up `parameter`: three for linear_qkv, two for linear_fc1, else one."""
    numbers = _NUMBER.findall(parameter.name)
    stem, kind = _NUMBER.sub("*", parameter.name).rsplit(".", 1)
    names = family_of(c).tensor_names[stem]
    if len(names) == 3:
        keys = c.num_kv_heads * c.head_dim
        rows = [c.num_attention_heads * c.head_dim, keys, keys]
    else:
        rows = [parameter.shape[0] // len(names)] * len(names)
    return [Piece(f"{_numbered(name, numbers)}.{kind}", num) for name, num in zip(names, rows, strict=True)]


def _numbered(name: str, numbers: list[str]) -> str:
    for number in numbers:
        name = name.replace("*", number, 1)
    return name


class HfSource:
    """The safetensors files below `directory`."""

    def __init__(self, directory: Path, model: ModelConfig) -> None:
        self._model = model
        self._files = _Files(directory)

    def read(self, parameter: Parameter, wanted: Range) -> torch.Tensor:
        found = pieces(parameter, self._model)
        if len(found) == 3:
            return self._qkv(found, parameter, wanted)
        if len(found) == 2:
            return self._gated(found, parameter, wanted)
        return self._files.read(found[0].name, parameter.shape, parameter.dim, wanted)

    def _qkv(self, found: list[Piece], parameter: Parameter, wanted: Range) -> torch.Tensor:
        """Rows of whole KV heads: each head's queries, its key, its value."""
        num_heads = self._model.num_kv_heads
        rows_per_head = parameter.extent // num_heads
        first, last = wanted.start // rows_per_head, wanted.end // rows_per_head
        parts = []
        for piece in found:
            each = piece.num_rows // num_heads
            shape = (piece.num_rows, *parameter.shape[1:])
            rows = self._files.read(piece.name, shape, 0, Range(first * each, last * each))
            parts.append(rows.reshape(last - first, each, *parameter.shape[1:]))
        return torch.cat(parts, dim=1).flatten(0, 1)

    def _gated(self, found: list[Piece], parameter: Parameter, wanted: Range) -> torch.Tensor:
        parts, begin = [], 0
        for piece in found:
            here = Range(max(wanted.start - begin, 0), min(wanted.end - begin, piece.num_rows))
            if here.start < here.end:
                parts.append(self._files.read(piece.name, (piece.num_rows, *parameter.shape[1:]), 0, here))
            begin += piece.num_rows
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class _Files:
    """The tensors of one or many safetensors files, by name; only slices are read."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        index = directory / "model.safetensors.index.json"
        self._file_of: dict[str, str] = _read_index(index) if index.exists() else {}
        self._open = {name: _open(directory / name) for name in sorted(set(self._file_of.values()))}
        if not index.exists():
            self._open = {"model.safetensors": _open(directory / "model.safetensors")}
            self._file_of = dict.fromkeys(self._open["model.safetensors"].keys(), "model.safetensors")

    def read(self, name: str, shape: tuple[int, ...], dim: int, wanted: Range) -> torch.Tensor:
        """Rows (dim 0) or columns (dim 1) of tensor `name`, which must have `shape`."""
        if name not in self._file_of:
            raise CheckpointError(f"{self._directory}: the tensor {name} is missing")
        path = self._directory / self._file_of[name]
        try:
            handle = self._open[self._file_of[name]].get_slice(name)
            found = tuple(handle.get_shape())
            if found != shape:
                raise CheckpointError(f"{path}: the tensor {name} has shape {found}, the model needs {shape}")
            tensor: torch.Tensor = (
                handle[wanted.start : wanted.end] if dim == 0 else handle[:, wanted.start : wanted.end]
            )
        except SafetensorError as error:
            raise CheckpointError(f"{path}: the tensor {name} cannot be read: {error}") from None
        require_weights(tensor.dtype, path, name)
        return tensor


def _read_index(path: Path) -> dict[str, str]:
    try:
        return {str(name): Path(file).name for name, file in json.loads(path.read_text())["weight_map"].items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {error}") from None


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        others = sorted(x.name for pattern in ("*.bin", "*.gguf", "*.pth") for x in path.parent.glob(pattern))
        hint = f"; {others[0]} is not read: only safetensors are" if others and not path.exists() else ""
        raise CheckpointError(f"{path} cannot be read: {error}{hint}") from None
