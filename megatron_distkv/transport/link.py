"""What a channel needs of the thing that carries it, once both sides know each other: shared memory, TCP, NIXL."""

import select
import socket
from collections.abc import Sequence
from typing import Protocol

import torch

from megatron_distkv.transport.frame import Frame
from megatron_distkv.transport.hello import Hello


class PeerLeft(ConnectionError):
    """The other side has closed between two messages, or before its first word: nothing is broken by that."""


class Link(Protocol):
    """One side of a connection. One message at a time in each direction; sizes were agreed on in the hello."""

    def send(self, sequence: int, kind: int, header: bytes, payload: Sequence[torch.Tensor] = ()) -> None:
        """Raises MessageTooLong before anything is sent, OSError when the peer is gone or takes nothing in."""
        ...

    def hear(self, timeout_s: float | None) -> Frame:
        """The next message's frame; raises TimeoutError, PeerLeft, another OSError, ValueError on garbage."""
        ...

    def is_audible(self, within_s: float) -> bool:
        """Whether `hear` would return, or raise, at once; raises OSError."""
        ...

    def read(self, frame: Frame, timeout_s: float) -> tuple[bytes, memoryview]:
        """Its header and its payload, a view that is good until the next message.

        Raises ValueError for one that does not fit, and where the link can go on after it; else OSError.
        """
        ...

    def close(self) -> None: ...


class Wire(Protocol):
    """A connection during the handshake: whole words. All raise OSError; `timeout_s` holds for each word."""

    def say(self, word: bytes) -> None: ...
    def hear(self) -> bytes:
        """b"" when the other side has closed."""
        ...

    def welcome(self, word: bytes, hello: Hello) -> Link:
        """The listener's last word, and the memory for the sizes in `hello`."""
        ...

    def hear_welcome(self) -> tuple[bytes, list[int]]:
        """The last word, and file descriptors that came with it: the caller closes them."""
        ...

    def link(self, fds: list[int], hello: Hello) -> Link:
        """The connecting side, after a last word that was in order; raises DistkvError for unusable memory."""
        ...


def is_readable(connection: socket.socket, within_s: float) -> bool:
    """Not by select(), which knows no file descriptor beyond 1,023."""
    waiting = select.poll()
    waiting.register(connection, select.POLLIN)
    return bool(waiting.poll(max(0.0, within_s) * 1000))
