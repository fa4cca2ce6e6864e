"""The doorbell's frame: which message it is, and where its parts end in the mailbox half that it rings for.

    mailbox = | request half: header, payload | reply half: header, payload |

One SEQPACKET datagram per ring; header and payload lie in shared memory. The payload begins at an aligned offset, so
that tensors can be read in place.
"""

import struct
from typing import NamedTuple

_LAYOUT = struct.Struct("<IIIQ")
FRAME_BYTES = _LAYOUT.size
# Payloads begin at a multiple of this: a cache line, and more than any dtype's alignment.
ALIGNMENT = 64
# `kind` of an answer whose header is an error sentence.
ERROR_KIND = 0xFFFFFFFF


class Frame(NamedTuple):
    sequence: int
    kind: int
    header_bytes: int
    payload_bytes: int

    def pack(self) -> bytes:
        return _LAYOUT.pack(*self)

    @property
    def payload_start(self) -> int:
        return aligned(self.header_bytes)

    def fits(self, half_bytes: int) -> bool:
        return self.payload_start + self.payload_bytes <= half_bytes


def unpack(data: bytes) -> Frame:
    """Raises ValueError when `data` is not one frame."""
    if len(data) != FRAME_BYTES:
        raise ValueError(f"a frame has {FRAME_BYTES} bytes, got {len(data)}")
    return Frame(*_LAYOUT.unpack(data))


def aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
