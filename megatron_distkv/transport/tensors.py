"""Tensors in a message's payload: one after the other, each at an aligned offset."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from megatron_distkv.errors import DistkvError
from megatron_distkv.transport.frame import aligned


class TensorSpec(NamedTuple):
    """What the receiver expects; never taken from the sender's bytes."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


class PayloadMismatch(DistkvError):
    """A payload has other bytes than the tensors that its header announces."""


def nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def payload_bytes(specs: Sequence[TensorSpec]) -> int:
    """Bytes that these tensors take in a payload."""
    end = 0
    for spec in specs:
        end = aligned(end + spec.num_bytes)
    return end


def read_tensors(payload: memoryview, specs: Sequence[TensorSpec]) -> list[torch.Tensor]:
    """Views (no copy) into `payload`, valid until the next message; raises PayloadMismatch on a wrong size."""
    if len(payload) != payload_bytes(specs):
        raise PayloadMismatch(f"expected {payload_bytes(specs)} payload bytes for {list(specs)}, got {len(payload)}")
    tensors, start = [], 0
    for spec in specs:
        if spec.num_bytes:
            flat = torch.frombuffer(payload, dtype=torch.uint8, count=spec.num_bytes, offset=start)
            tensors.append(flat.view(spec.dtype).view(spec.shape))
        else:
            tensors.append(torch.empty(spec.shape, dtype=spec.dtype))
        start = aligned(start + spec.num_bytes)
    return tensors
