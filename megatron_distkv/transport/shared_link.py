"""Processes of one host: messages lie in a shared mailbox, a SEQPACKET unix socket rings for them."""

import fcntl
import mmap
import os
import socket
from collections.abc import Sequence

import torch

from megatron_distkv.errors import DistkvError
from megatron_distkv.transport.frame import FRAME_BYTES, Frame, unpack
from megatron_distkv.transport.hello import MAX_HELLO_BYTES, Hello
from megatron_distkv.transport.link import PeerLeft, is_readable
from megatron_distkv.transport.mailbox import SEALS, Half, create_memory


class SharedLink:
    """A link: `outbox` and `inbox` are the halves of one mailbox."""

    def __init__(self, doorbell: socket.socket, outbox: Half, inbox: Half) -> None:
        self._doorbell = doorbell
        self._outbox = outbox
        self._inbox = inbox

    def send(self, sequence: int, kind: int, header: bytes, payload: Sequence[torch.Tensor] = ()) -> None:
        size = self._outbox.write(header, payload)
        self._doorbell.send(Frame(sequence, kind, len(header), size).pack())

    def hear(self, timeout_s: float | None) -> Frame:
        self._doorbell.settimeout(timeout_s)
        data = self._doorbell.recv(FRAME_BYTES + 1)
        if not data:
            raise PeerLeft("it has closed the channel")
        return unpack(data)

    def is_audible(self, within_s: float) -> bool:
        return is_readable(self._doorbell, within_s)

    def read(self, frame: Frame, timeout_s: float) -> tuple[bytes, memoryview]:
        if not frame.fits(self._inbox.size):
            raise ValueError("the message does not fit in the mailbox")
        return self._inbox.header(frame.header_bytes), self._inbox.payload(frame.payload_start, frame.payload_bytes)

    def close(self) -> None:
        self._doorbell.close()


class DatagramWire:
    """A wire: every word is one datagram; the mailbox travels as a file descriptor."""

    def __init__(self, connection: socket.socket, timeout_s: float) -> None:
        self._connection = connection
        connection.settimeout(timeout_s)

    def say(self, word: bytes) -> None:
        self._connection.send(word)

    def hear(self) -> bytes:
        return self._connection.recv(MAX_HELLO_BYTES)

    def welcome(self, word: bytes, hello: Hello) -> SharedLink:
        fd = create_memory(hello.request_bytes + hello.reply_bytes)
        try:
            memory = mmap.mmap(fd, hello.request_bytes + hello.reply_bytes)
            socket.send_fds(self._connection, [word], [fd])
        finally:
            os.close(fd)
        requests, replies = _halves(memory, hello)
        return SharedLink(self._connection, outbox=replies, inbox=requests)

    def hear_welcome(self) -> tuple[bytes, list[int]]:
        data, fds, _, _ = socket.recv_fds(self._connection, MAX_HELLO_BYTES, 1)
        return data, fds

    def link(self, fds: list[int], hello: Hello) -> SharedLink:
        """Only memory that cannot shrink under our feet: reading past a shrunk file's end would kill this process."""
        size_bytes = hello.request_bytes + hello.reply_bytes
        if not fds:
            raise DistkvError("it sent no mailbox")
        if fcntl.fcntl(fds[0], fcntl.F_GET_SEALS) & SEALS != SEALS or os.fstat(fds[0]).st_size != size_bytes:
            raise DistkvError("it sent a mailbox of another size, or one that it could shrink")
        requests, replies = _halves(mmap.mmap(fds[0], size_bytes), hello)
        return SharedLink(self._connection, outbox=requests, inbox=replies)


def _halves(memory: mmap.mmap, hello: Hello) -> tuple[Half, Half]:
    """Requests, replies."""
    return Half(memory, 0, hello.request_bytes), Half(memory, hello.request_bytes, hello.reply_bytes)
