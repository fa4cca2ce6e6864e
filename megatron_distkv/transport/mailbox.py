"""The shared memory of one channel: the listener makes and owns it, the connecting side maps it too.

It belongs to the creditor, so a late write of a debtor lands in a mailbox and never in a KV pool. The memory is a
sealed memfd: no name to clean up, and neither side can shrink it under the other (SIGBUS for the reader).
"""

import fcntl
import mmap
import os
from collections.abc import Sequence

import torch

from megatron_distkv.errors import DistkvError
from megatron_distkv.transport.frame import aligned
from megatron_distkv.transport.tensors import nbytes

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class MessageTooLong(DistkvError):
    """A message does not fit in the mailbox that was agreed on in the hello."""


def create_memory(size_bytes: int) -> int:
    """A new sealed memfd; the caller closes it."""
    fd = os.memfd_create("distkv-mailbox", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size_bytes)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    return fd


def payload_size(header: bytes, payload: Sequence[torch.Tensor], max_bytes: int) -> int:
    """Bytes of a payload, each tensor aligned; raises MessageTooLong when it does not fit behind its header."""
    start = aligned(len(header))
    end = start
    for tensor in payload:
        end = aligned(end + nbytes(tensor))
    if end > max_bytes:
        raise MessageTooLong(f"a message of {end} bytes does not fit in a mailbox half of {max_bytes}")
    return end - start


class Half:
    """One direction of a mailbox: bytes `[start, start + size)` of the mapped memory."""

    def __init__(self, memory: mmap.mmap | bytearray, start: int, size: int) -> None:
        self._view = memoryview(memory)[start : start + size]
        self._bytes = torch.frombuffer(self._view, dtype=torch.uint8)
        self.size = size

    def write(self, header: bytes, payload: Sequence[torch.Tensor]) -> int:
        """Lay header and tensors (each aligned) into the half; returns the payload's bytes. Raises MessageTooLong."""
        size = payload_size(header, payload, self.size)
        self._view[: len(header)] = header
        place = aligned(len(header))
        for tensor in payload:
            target = self._bytes[place : place + nbytes(tensor)].view(tensor.dtype).view(tensor.shape)
            target.copy_(tensor)
            place = aligned(place + nbytes(tensor))
        return size

    def header(self, size: int) -> bytes:
        return bytes(self._view[:size])

    def payload(self, start: int, size: int) -> memoryview:
        return self._view[start : start + size]


def pack_tensors(tensors: Sequence[torch.Tensor]) -> memoryview:
    """A payload of these, as a message carries it."""
    size = payload_size(b"", tensors, 1 << 62)
    half = Half(bytearray(max(1, size)), 0, size)
    half.write(b"", tensors)
    return half.payload(0, size)
