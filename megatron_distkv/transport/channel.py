"""The connecting side: ask one question at a time, and never wait beyond a deadline."""

import contextlib
import mmap
import select
import socket
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch

from megatron_distkv.errors import DistkvError, PeerLost
from megatron_distkv.transport.frame import ERROR_KIND, FRAME_BYTES, Frame, unpack
from megatron_distkv.transport.handshake import introduce
from megatron_distkv.transport.hello import Hello
from megatron_distkv.transport.mailbox import Half
from megatron_distkv.transport.pool_secret import OPEN_POOL

UNIX_PREFIX = "unix:"


class Reply(NamedTuple):
    """`payload` is a view into the mailbox: read it before the next post."""

    header: bytes
    payload: memoryview


class RequestFailed(DistkvError):
    """The peer lives but could not answer; the sentence is its own."""


def connect(address: str, hello: Hello, *, peer: str, timeout_s: float, secret: bytes = OPEN_POOL) -> "Channel":
    """Open a channel to the listener at `unix:PATH`; raises PeerLost when it is not there, silent, or says no.

    `timeout_s` holds for each word of the handshake.
    """
    if not address.startswith(UNIX_PREFIX):
        raise PeerLost(peer, f"cannot reach {address!r}: only unix:PATH addresses are known")
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(timeout_s)
    try:
        connection.connect(address.removeprefix(UNIX_PREFIX))
        memory = introduce(connection, hello, secret)
    except (OSError, ValueError, DistkvError) as error:  # ValueError: a path that no file can have
        connection.close()
        raise PeerLost(peer, f"no channel to {address}: {error}") from error
    return Channel(peer, connection, memory, hello)


class Channel:
    """One outstanding exchange at a time: `post`, then `wait`. A lost peer stays lost: open a new channel."""

    def __init__(self, peer: str, connection: socket.socket, memory: mmap.mmap, hello: Hello) -> None:
        self.peer = peer
        self._connection = connection
        self._outbox = Half(memory, 0, hello.request_bytes)
        self._inbox = Half(memory, hello.request_bytes, hello.reply_bytes)
        self._sequence = 0
        self._is_waiting = False
        self.is_open = True

    def post(self, kind: int, header: bytes, payload: Sequence[torch.Tensor] = ()) -> None:
        """Send a message; raises PeerLost, or MessageTooLong before anything is sent."""
        self._require_open()
        if self._is_waiting:
            raise RuntimeError(f"a message to {self.peer} still waits for its answer")
        size = self._outbox.write(header, payload)
        self._sequence += 1
        frame = Frame(self._sequence, kind, len(header), size)
        try:
            self._connection.send(frame.pack())
        except OSError as error:
            raise self._lose(str(error)) from error
        self._is_waiting = True

    def wait(self, deadline_s: float) -> Reply:
        """The answer to the posted message; raises PeerLost after `deadline_s` or at EOF, RequestFailed on an error."""
        self._require_open()
        if not self._is_waiting:
            raise RuntimeError(f"nothing was posted to {self.peer}")
        frame = self._receive(time.monotonic() + deadline_s)
        self._is_waiting = False
        header = self._inbox.header(frame.header_bytes)
        if frame.kind == ERROR_KIND:
            raise RequestFailed(f"{self.peer}: {header.decode(errors='replace')}")
        return Reply(header, self._inbox.payload(frame.payload_start, frame.payload_bytes))

    def is_answered(self, within_s: float) -> bool:
        """Whether `wait` would return, or raise, at once; nothing is lost by asking."""
        self._require_open()
        readable, _, _ = select.select([self._connection], [], [], within_s)
        return bool(readable)

    def give_up(self, reason: str) -> PeerLost:
        """The peer is lost, as somebody else has found out."""
        return self._lose(reason)

    def call(self, kind: int, header: bytes, payload: Sequence[torch.Tensor] = (), *, deadline_s: float) -> Reply:
        self.post(kind, header, payload)
        return self.wait(deadline_s)

    def close(self) -> None:
        self.is_open = False
        self._connection.close()

    def _receive(self, end_s: float) -> Frame:
        try:
            self._connection.settimeout(max(1e-3, end_s - time.monotonic()))
            frame = unpack(self._connection.recv(FRAME_BYTES + 1) or self._eof())
        except TimeoutError as error:
            raise self._lose("no answer within the deadline") from error
        except (OSError, ValueError) as error:
            raise self._lose(str(error)) from error
        if frame.sequence != self._sequence or not frame.fits(self._inbox.size):
            raise self._lose("it answered out of turn")
        return frame

    @staticmethod
    def _eof() -> bytes:
        raise OSError("it is gone (end of stream)")

    def _lose(self, reason: str) -> PeerLost:
        with contextlib.suppress(OSError):
            self.close()
        return PeerLost(self.peer, reason)

    def _require_open(self) -> None:
        if not self.is_open:
            raise PeerLost(self.peer, "the channel is closed")
