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


async def read(reader: asyncio.StreamReader, decoder: "msgspec.msgpack.Decoder[Any]") -> Any:
    """The next message. Raises IncompleteReadError at EOF, ValueError or MsgspecError on garbage."""
    (size,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    if size > MAX_MESSAGE_BYTES:
        raise ValueError(f"a message of {size} bytes is longer than {MAX_MESSAGE_BYTES}")
    body = await reader.readexactly(size)
    try:
        return decoder.decode(body)
    except RecursionError as error:  # arrays in arrays in arrays
        raise ValueError(str(error)) from None
