"""Payloads by NIXL (one-sided writes over UCX: RDMA where there is any, else shared memory or TCP), doorbells over TCP.

A message is written into the other side's registered inbox and announced by a frame; the receiver waits for NIXL's own
notice of that write. Both sides drive NIXL only while they wait for it: no thread polls. What fails or lasts too long
ends the link. NIXL does not encrypt.
"""

import contextlib
import importlib
import importlib.util
import mmap
import os
import socket
import time
import uuid
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import msgspec
import torch

from megatron_distkv.errors import DistkvError
from megatron_distkv.transport.frame import Frame, aligned
from megatron_distkv.transport.hello import Hello
from megatron_distkv.transport.link import Link
from megatron_distkv.transport.mailbox import Half
from megatron_distkv.transport.stream_link import STALLED_S, StreamLink, StreamWire

# The package is named after the CUDA that it was built beside; all of them serve host memory.
_PACKAGES = ("nixl_cu13", "nixl_cu12", "nixl")
# A write that is not done by then goes on beside what its sender does next, and only arrives when that is done.
LOOKED_AFTER_S = 0.02
_MAX_WORD_BYTES = 1 << 16
_HOST_MEMORY = "DRAM"


@cache
def nixl_package() -> str | None:
    """None: NIXL is not installed (the extra `nixl`)."""
    return next((name for name in _PACKAGES if importlib.util.find_spec(name) is not None), None)


class _Region(msgspec.Struct, frozen=True):
    """Where a side wants its messages, for the other side's NIXL."""

    metadata: bytes
    inbox_address: int


class NixlLink:
    """A link: the frames of a `StreamLink` without what follows them."""

    def __init__(self, connection: socket.socket, agent: "_Agent", inbox: Half, outbox: Half) -> None:
        self._frames = StreamLink(connection, 0, inbox)
        self._agent = agent
        self._inbox = inbox
        self._outbox = outbox

    def send(self, sequence: int, kind: int, header: bytes, payload: Sequence[torch.Tensor] = ()) -> None:
        """Returns when the message has arrived or after a moment: a peer that is slow costs its deadline in `hear`."""
        size = self._outbox.write(header, payload)
        self._agent.begin_write(max(1, aligned(len(header)) + size), sequence)
        self._frames.send_frame(Frame(sequence, kind, len(header), size))
        with contextlib.suppress(TimeoutError):
            self._agent.finish_write(LOOKED_AFTER_S)

    def hear(self, timeout_s: float | None) -> Frame:
        self._agent.finish_write(timeout_s or STALLED_S)
        return self._frames.hear(timeout_s)

    def is_audible(self, within_s: float) -> bool:
        began_s = time.monotonic()
        try:
            self._agent.finish_write(within_s)
        except TimeoutError:
            return False
        return self._frames.is_audible(max(0.0, began_s + within_s - time.monotonic()))

    def read(self, frame: Frame, timeout_s: float) -> tuple[bytes, memoryview]:
        if not frame.fits(self._inbox.size):
            raise ConnectionError("it sends a message that does not fit")
        self._agent.await_notice(frame.sequence, min(timeout_s, STALLED_S))
        return self._inbox.header(frame.header_bytes), self._inbox.payload(frame.payload_start, frame.payload_bytes)

    def close(self) -> None:
        self._frames.close()
        self._agent.close()


class NixlWire(StreamWire):
    """A wire: after the last word both sides say where their inboxes are."""

    def welcome(self, word: bytes, hello: Hello) -> Link:
        self.say(word)
        return self._connect(hello.request_bytes, hello.reply_bytes)

    def link(self, fds: list[int], hello: Hello) -> Link:
        return self._connect(hello.reply_bytes, hello.request_bytes)

    def _connect(self, inbox_bytes: int, outbox_bytes: int) -> NixlLink:
        inbox_size = aligned(inbox_bytes)
        memory = mmap.mmap(-1, inbox_size + aligned(outbox_bytes))
        agent = _Agent(memory, inbox_size)
        try:
            self.say(msgspec.msgpack.encode(agent.region))
            self._max_word_bytes = _MAX_WORD_BYTES
            agent.meet(msgspec.msgpack.decode(self.hear(), type=_Region))
        except BaseException as error:
            agent.close()
            if isinstance(error, msgspec.MsgspecError):
                raise DistkvError(f"it does not say where its inbox is: {error}") from None
            raise
        return NixlLink(self._connection, agent, Half(memory, 0, inbox_bytes), Half(memory, inbox_size, outbox_bytes))


class _Agent:
    """One side's NIXL, with one registered region: | inbox | outbox |."""

    def __init__(self, memory: mmap.mmap, inbox_size: int) -> None:
        package = nixl_package()
        if package is None:
            raise DistkvError("NIXL is not installed here: pip install megatron-distkv[nixl]")
        os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")
        api = importlib.import_module(f"{package}._api")
        self._nixl: Any = api.nixl_agent(uuid.uuid4().hex, api.nixl_agent_config(enable_prog_thread=False))
        self._bytes = torch.frombuffer(memory, dtype=torch.uint8)
        self._outbox_address = self._bytes.data_ptr() + inbox_size
        self._registered = self._nixl.register_memory(self._bytes)
        self._peer, self._peer_inbox = "", 0
        self._notices: set[int] = set()
        self._writing: Any = None
        self.region = _Region(self._nixl.get_agent_metadata(), self._bytes.data_ptr())

    def meet(self, peer: _Region) -> None:
        with _as_lost():
            name = self._nixl.add_remote_agent(peer.metadata)
        self._peer = name.decode() if isinstance(name, bytes) else name
        self._peer_inbox = peer.inbox_address

    def begin_write(self, num_bytes: int, sequence: int) -> None:
        """The first bytes of the outbox to the other side's inbox."""
        with _as_lost():
            mine, theirs = (
                self._nixl.get_xfer_descs([(address, num_bytes, 0)], _HOST_MEMORY)
                for address in (self._outbox_address, self._peer_inbox)
            )
            self._writing = self._nixl.initialize_xfer("WRITE", mine, theirs, self._peer, str(sequence).encode())
            self._nixl.transfer(self._writing)

    def finish_write(self, timeout_s: float) -> None:
        """The write that was begun last. Its notice leaves only while its sender looks after it."""
        if self._writing is None:
            return
        with _as_lost():
            _wait(lambda: self._is_done(self._writing), timeout_s)
            self._nixl.release_xfer_handle(self._writing)
            self._writing = None

    def await_notice(self, sequence: int, timeout_s: float) -> None:
        with _as_lost():
            _wait(lambda: self._has_notice(sequence), timeout_s)
        self._notices.discard(sequence)

    def close(self) -> None:
        with contextlib.suppress(Exception):
            if self._writing is not None:
                self._nixl.release_xfer_handle(self._writing)
            if self._peer:
                self._nixl.remove_remote_agent(self._peer)
            self._nixl.deregister_memory(self._registered)
        self._peer = ""

    def _is_done(self, handle: Any) -> bool:
        state = self._nixl.check_xfer_state(handle)
        if state == "ERR":
            raise ConnectionError("NIXL could not write")
        return bool(state == "DONE")

    def _has_notice(self, sequence: int) -> bool:
        for notices in self._nixl.get_new_notifs().values():
            self._notices.update(int(notice) for notice in notices if notice.isdigit())
        return sequence in self._notices


@contextlib.contextmanager
def _as_lost() -> Any:
    """NIXL's own errors are many; for a channel each of them means that the peer is lost."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise ConnectionError(f"NIXL: {error}") from error


def _wait(is_done: Callable[[], bool], timeout_s: float) -> None:
    """Raises TimeoutError. Short waits spin; longer ones leave the core to others."""
    began_s = time.monotonic()
    while not is_done():
        waited_s = time.monotonic() - began_s
        if waited_s > timeout_s:
            raise TimeoutError("timed out")
        time.sleep(0 if waited_s < 1e-3 else 1e-4)
