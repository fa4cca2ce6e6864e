"""Bytes of another process: read in one place, refused where they do not fit the type that was asked for."""

from typing import Annotated, TypeVar

import msgspec

from megatron_distkv.errors import UnreadableMessage

BlockId = Annotated[int, msgspec.Meta(ge=0, le=(1 << 31) - 1)]
Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 31) - 1)]
Positive = Annotated[float, msgspec.Meta(gt=0)]
Serial = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]  # epochs, steps

_T = TypeVar("_T")


def decode(data: bytes, kind: type[_T]) -> _T:
    """Bytes of a peer as a `kind`; raises UnreadableMessage, whatever they are."""
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except (msgspec.MsgspecError, RecursionError) as error:  # RecursionError: arrays in arrays in arrays
        raise UnreadableMessage(f"a {kind.__name__} cannot be read: {error}") from None
