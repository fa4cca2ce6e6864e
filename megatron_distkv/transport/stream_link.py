"""Processes of different hosts: the same frames over TCP, or TLS over TCP, each followed by its header and payload.

    | frame | header | payload |        tensors of a payload are padded as in a mailbox, the header is not

Tensors are sent from where they lie and received to where they are read. Every wait ends: for a word, for the rest of a
message, for a peer that takes nothing in; keepalive ends connections whose other side has vanished.
"""

import mmap
import socket
import ssl
import struct
import time
from collections.abc import Sequence
from contextlib import suppress

import torch

from megatron_distkv.transport.frame import ALIGNMENT, FRAME_BYTES, Frame, aligned, unpack
from megatron_distkv.transport.hello import MAX_HELLO_BYTES, Hello
from megatron_distkv.transport.link import Link, PeerLeft, is_readable
from megatron_distkv.transport.mailbox import Half, payload_size
from megatron_distkv.transport.tensors import nbytes

_WORD_SIZE = struct.Struct("<I")
_PADDING = bytes(ALIGNMENT)
# A message that has begun, or that the peer does not take in, must not hold a thread for longer than this.
STALLED_S = 30.0
# Keepalive: an idle connection whose other host has vanished ends after about 10 + 3 * 5 seconds.
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3))


def set_options(connection: socket.socket) -> None:
    """For every TCP connection of ours, before its first byte."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE:
        connection.setsockopt(socket.IPPROTO_TCP, option, value)


class StreamLink:
    """A link. `max_sent_bytes`: what the other side has room for."""

    def __init__(self, connection: socket.socket, max_sent_bytes: int, inbox: Half) -> None:
        self._connection = connection
        self._max_sent_bytes = max_sent_bytes
        self._inbox = inbox
        self._frame = bytearray(FRAME_BYTES)

    def send(self, sequence: int, kind: int, header: bytes, payload: Sequence[torch.Tensor] = ()) -> None:
        size = payload_size(header, payload, self._max_sent_bytes)
        pieces = [memoryview(Frame(sequence, kind, len(header), size).pack() + header)]
        for tensor in payload:
            pieces.append(_bytes_of(tensor))
            pieces.append(memoryview(_PADDING)[: aligned(nbytes(tensor)) - nbytes(tensor)])
        _send_all(self._connection, [piece for piece in pieces if piece.nbytes], time.monotonic() + STALLED_S)

    def send_frame(self, frame: Frame) -> None:
        """Alone: what it announces travels otherwise."""
        _send_all(self._connection, [memoryview(frame.pack())], time.monotonic() + STALLED_S)

    def hear(self, timeout_s: float | None) -> Frame:
        self._connection.settimeout(timeout_s)
        began = self._connection.recv_into(self._frame)
        if not began:
            raise PeerLeft("it has closed the channel")
        rest = memoryview(self._frame)[began:]
        _receive_all(self._connection, rest, time.monotonic() + min(timeout_s or STALLED_S, STALLED_S))
        return unpack(bytes(self._frame))

    def is_audible(self, within_s: float) -> bool:
        if isinstance(self._connection, ssl.SSLSocket) and self._connection.pending():
            return True
        return is_readable(self._connection, within_s)

    def read(self, frame: Frame, timeout_s: float) -> tuple[bytes, memoryview]:
        if not frame.fits(self._inbox.size):
            raise ConnectionError("it sends a message that does not fit")
        end_s = time.monotonic() + min(timeout_s, STALLED_S)
        header, payload = (
            self._inbox.payload(0, frame.header_bytes),
            self._inbox.payload(frame.payload_start, frame.payload_bytes),
        )
        _receive_all(self._connection, header, end_s)
        _receive_all(self._connection, payload, end_s)
        return bytes(header), payload

    def close(self) -> None:
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()


class StreamWire:
    """A wire: every word is preceded by its length, 4 bytes, little-endian."""

    def __init__(self, connection: socket.socket, timeout_s: float) -> None:
        self._connection = connection
        self._timeout_s = timeout_s
        self._max_word_bytes = MAX_HELLO_BYTES
        connection.settimeout(timeout_s)

    def say(self, word: bytes) -> None:
        _send_all(self._connection, [memoryview(_WORD_SIZE.pack(len(word)) + word)], self._end_s())

    def hear(self) -> bytes:
        end_s, size = self._end_s(), bytearray(_WORD_SIZE.size)
        began = self._connection.recv_into(size)
        if not began:
            return b""
        _receive_all(self._connection, memoryview(size)[began:], end_s)
        (num_bytes,) = _WORD_SIZE.unpack(size)
        if num_bytes > self._max_word_bytes:
            raise ConnectionError(f"it sends a word of {num_bytes} bytes: it does not speak this protocol")
        word = bytearray(num_bytes)
        _receive_all(self._connection, memoryview(word), end_s)
        return bytes(word)

    def welcome(self, word: bytes, hello: Hello) -> Link:
        inbox = _memory(hello.request_bytes)
        self.say(word)
        return StreamLink(self._connection, hello.reply_bytes, inbox)

    def hear_welcome(self) -> tuple[bytes, list[int]]:
        return self.hear(), []

    def link(self, fds: list[int], hello: Hello) -> Link:
        return StreamLink(self._connection, hello.request_bytes, _memory(hello.reply_bytes))

    def _end_s(self) -> float:
        return time.monotonic() + self._timeout_s


def _memory(size_bytes: int) -> Half:
    """Pages of it are taken only when messages fill them."""
    return Half(mmap.mmap(-1, size_bytes), 0, size_bytes)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data


def _send_all(connection: socket.socket, pieces: list[memoryview], end_s: float) -> None:
    """Raises TimeoutError when the peer does not take it in until then."""
    while pieces:
        connection.settimeout(_left_s(end_s))
        # TLS has no sendmsg
        sent = connection.send(pieces[0]) if isinstance(connection, ssl.SSLSocket) else connection.sendmsg(pieces)
        while pieces and sent >= pieces[0].nbytes:
            sent -= pieces.pop(0).nbytes
        if sent:
            pieces[0] = pieces[0][sent:]


def _receive_all(connection: socket.socket, view: memoryview, end_s: float) -> None:
    """Fills `view`; raises TimeoutError, ConnectionError when the stream ends before."""
    while view.nbytes:
        connection.settimeout(_left_s(end_s))
        received = connection.recv_into(view)
        if not received:
            raise ConnectionError("it is gone in the middle of a message")
        view = view[received:]


def _left_s(end_s: float) -> float:
    left_s = end_s - time.monotonic()
    if left_s <= 0:
        raise TimeoutError("timed out")
    return left_s
