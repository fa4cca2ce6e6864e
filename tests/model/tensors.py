"""Whole tensors of a checkpoint, for bit-by-bit comparisons."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from megatron_distkv.model.parameter import Range
from megatron_distkv.model.weights import find_checkpoint, open_source
from megatron_distkv.model.weights.parameters import model_parameters


def whole_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Every parameter under Megatron-core's names, read by this project."""
    checkpoint = find_checkpoint(path)
    source = open_source(checkpoint, checkpoint.model)
    return {x.name: source.read(x, Range(0, x.extent)) for x in model_parameters(checkpoint.model)}


def safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a Hugging Face checkpoint, read by safetensors alone."""
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name
