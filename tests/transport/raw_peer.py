"""A peer that says what a test wants, byte by byte, on a real channel."""

import mmap
import os
import socket

import msgspec

from megatron_distkv.transport import OPEN_POOL, PROTOCOL_VERSION, Hello
from megatron_distkv.transport.frame import FRAME_BYTES, Frame, aligned, unpack
from megatron_distkv.transport.hello import Proof, Welcome
from megatron_distkv.transport.pool_secret import Side, proof

# Longer than a loaded machine needs; a listener that is silent for so long hangs.
SILENCE_S = 10.0


def hello(**changes: object) -> Hello:
    values = {
        "protocol_version": PROTOCOL_VERSION, "pool": "p", "instance_id": "a", "epoch": 1, "rank": 0,
        "request_bytes": 1 << 16, "reply_bytes": 1 << 16,
    }  # fmt: skip
    return Hello(**{**values, **changes})  # type: ignore[arg-type]


class RawPeer:
    """`with RawPeer(address) as peer:` is connected and has said nothing."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(SILENCE_S)
        try:
            self.socket.connect(address.removeprefix("unix:"))
        except OSError:
            self.socket.close()
            raise
        self.memory: mmap.mmap | None = None
        self.request_bytes = 0

    def __enter__(self) -> "RawPeer":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def say(self, data: bytes) -> bytes:
        """The answer to one datagram; b"" when the other side has closed."""
        try:
            self.socket.send(data)
            return self.socket.recv(4096)
        except (ConnectionError, BrokenPipeError):
            return b""

    def shake_hands(self, hello: Hello, secret: bytes = OPEN_POOL, mac: bytes | None = None) -> Welcome:
        said = msgspec.msgpack.encode(hello)
        challenge = self.say(said)
        answer = proof(secret, Side.CONNECTING, said, challenge) if mac is None else mac
        self.socket.send(msgspec.msgpack.encode(Proof(answer)))
        data, fds, _, _ = socket.recv_fds(self.socket, 4096, 1)
        if fds:
            self.request_bytes = hello.request_bytes
            self.memory = mmap.mmap(fds[0], hello.request_bytes + hello.reply_bytes)
            os.close(fds[0])
        return msgspec.msgpack.decode(data, type=Welcome)

    def ring(self, kind: int, header: bytes, payload: bytes = b"") -> tuple[Frame, bytes]:
        """An honest doorbell over a header and a payload that need not be; returns the answer's frame and header."""
        assert self.memory is not None
        start = aligned(len(header))
        self.memory[: len(header)] = header
        self.memory[start : start + len(payload)] = payload
        frame = unpack(self.say(Frame(1, kind, len(header), len(payload)).pack())[: FRAME_BYTES + 1])
        return frame, self.memory[self.request_bytes : self.request_bytes + frame.header_bytes]
