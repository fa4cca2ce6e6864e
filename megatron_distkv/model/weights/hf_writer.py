"""Write a Hugging Face checkpoint: config.json and safetensors of limited size, one file in memory at a time."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron_distkv.config.model import ModelConfig
from megatron_distkv.model.parameter import Parameter, Range
from megatron_distkv.model.weights.hf import Piece, pieces
from megatron_distkv.model.weights.hf_config import config_text
from megatron_distkv.model.weights.parameters import model_parameters
from megatron_distkv.model.weights.source import Source, with_progress

MAX_FILE_BYTES = 2 << 30


def write_hf(
    source: Source, model: ModelConfig, dtype: torch.dtype, directory: Path, *, max_file_bytes: int = MAX_FILE_BYTES
) -> Path:
    """Tensors first, config.json last: what is found has been written whole."""
    text = config_text(model, directory / "config.json")
    directory.mkdir(parents=True, exist_ok=True)
    files = _plan(model, dtype, max_file_bytes)
    file_of: dict[str, str] = {}
    total = 0
    for number, parameters in enumerate(files, 1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors" if len(files) > 1 else "model.safetensors"
        tensors: dict[str, torch.Tensor] = {}
        for parameter in with_progress(parameters, f"file {number} of {len(files)}"):
            whole = source.read(parameter, Range(0, parameter.extent)).to(dtype)
            tensors.update(_split(whole, pieces(parameter, model), parameter, model))
        save_file(tensors, directory / name, metadata={"format": "pt"})
        file_of.update(dict.fromkeys(tensors, name))
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(file_of.items()))}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (directory / "config.json").write_text(text)
    return directory


def _plan(model: ModelConfig, dtype: torch.dtype, max_file_bytes: int) -> list[list[Parameter]]:
    """Parameters by file, in order; one that is larger than the limit has a file of its own."""
    files: list[list[Parameter]] = [[]]
    used = 0
    for parameter in model_parameters(model):
        size = torch.Size(parameter.shape).numel() * dtype.itemsize
        if files[-1] and used + size > max_file_bytes:
            files.append([])
            used = 0
        files[-1].append(parameter)
        used += size
    return files


def _split(
    whole: torch.Tensor, into: list[Piece], parameter: Parameter, model: ModelConfig
) -> Iterator[tuple[str, torch.Tensor]]:
    if len(into) < 3:
        for piece, rows in zip(into, whole.split([piece.num_rows for piece in into]), strict=True):
            yield piece.name, rows.contiguous().clone()
        return
    heads = whole.view(model.num_kv_heads, -1, *parameter.shape[1:])
    each = [piece.num_rows // model.num_kv_heads for piece in into]
    for piece, rows in zip(into, heads.split(each, dim=1), strict=True):
        yield piece.name, rows.flatten(0, 1).contiguous().clone()
