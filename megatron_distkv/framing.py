"""Messages of a stream socket: 4 bytes of length (big-endian), then MessagePack. Used by gateway and instances."""

import asyncio
import struct
from typing import Any

import msgspec

_LENGTH = struct.Struct(">I")
# A prompt of ten million tokens fits; a length beyond this is garbage, not a message.
MAX_MESSAGE_BYTES = 64 << 20


def pack(message: msgspec.Struct) -> bytes:
    body = msgspec.msgpack.encode(message)
    return _LENGTH.pack(len(body)) + body


class Frames:
    """Messages out of whatever pieces the stream comes in: many in one piece cost one wait."""

    def __init__(self, decoder: "msgspec.msgpack.Decoder[Any]") -> None:
        self._decoder = decoder
        self._data = bytearray()

    def add(self, data: bytes) -> list[Any]:
        """The messages that are whole now. Raises ValueError or MsgspecError on garbage."""
        self._data += data
        messages, at = [], 0
        with memoryview(self._data) as view:
            while len(view) - at >= _LENGTH.size:
                end = at + _LENGTH.size + _size(view[at : at + _LENGTH.size])
                if end > len(view):
                    break
                messages.append(_decode(self._decoder, view[at + _LENGTH.size : end]))
                at = end
        del self._data[:at]
        return messages


async def read(reader: asyncio.StreamReader, decoder: "msgspec.msgpack.Decoder[Any]") -> Any:
    """The next message. Raises IncompleteReadError at EOF, ValueError or MsgspecError on garbage."""
    size = _size(await reader.readexactly(_LENGTH.size))
    return _decode(decoder, await reader.readexactly(size))


def _size(head: bytes | memoryview) -> int:
    (size,) = _LENGTH.unpack(head)
    if size > MAX_MESSAGE_BYTES:
        raise ValueError(f"a message of {size} bytes is longer than {MAX_MESSAGE_BYTES}")
    return int(size)


def _decode(decoder: "msgspec.msgpack.Decoder[Any]", body: bytes | memoryview) -> Any:
    try:
        return decoder.decode(body)
    except RecursionError as error:  # arrays in arrays in arrays
        raise ValueError(str(error)) from None
