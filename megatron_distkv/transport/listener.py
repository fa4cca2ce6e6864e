"""The listening side: a thread per connection answers its questions, one at a time."""

import contextlib
import mmap
import os
import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch

from megatron_distkv.errors import UserError
from megatron_distkv.log import get_logger
from megatron_distkv.transport.channel import UNIX_PREFIX
from megatron_distkv.transport.frame import ERROR_KIND, FRAME_BYTES, Frame, unpack
from megatron_distkv.transport.handshake import Greeting, HelloRefused
from megatron_distkv.transport.hello import Hello
from megatron_distkv.transport.mailbox import Half, create_memory
from megatron_distkv.transport.pool_secret import OPEN_POOL

logger = get_logger(__name__)
# A client that connects and says nothing must not hold a thread for ever.
HELLO_TIMEOUT_S = 5.0
# A unix socket's path is at most this long.
MAX_SOCKET_PATH_BYTES = 107


class Request(NamedTuple):
    """`payload` is a view into the mailbox, valid until the answer is returned."""

    kind: int
    header: bytes
    payload: memoryview


class Answer(NamedTuple):
    header: bytes
    payload: Sequence[torch.Tensor] = ()


Handler: TypeAlias = Callable[[Hello, Request], Answer]


class Listener:
    """Accepts channels at `unix:PATH` from who knows `pool` and its `secret`; each has a thread that runs `handler`."""

    def __init__(
        self,
        address: str,
        pool: str,
        handler: Handler,
        *,
        secret: bytes = OPEN_POOL,
        on_disconnect: Callable[[Hello], None] | None = None,
        max_mailbox_bytes: int = 1 << 30,
    ) -> None:
        self._path = Path(address.removeprefix(UNIX_PREFIX))
        self._pool = pool
        self._handler = handler
        self._secret = secret
        self._on_disconnect = on_disconnect
        self._max_mailbox_bytes = max_mailbox_bytes
        self._connections: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._is_closed = False
        self._socket = _bind(self._path)
        threading.Thread(target=self._accept, name=f"listen {self._path.name}", daemon=True).start()

    def close(self) -> None:
        """Drop all channels (their peers see EOF) and remove the socket."""
        with self._lock:
            self._is_closed = True
            connections = [self._socket, *self._connections]
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._path.unlink(missing_ok=True)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with self._lock:
                if self._is_closed:
                    connection.close()
                    return
                self._connections.add(connection)
            threading.Thread(target=self._serve, args=(connection,), name="channel", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        hello = None
        try:
            connection.settimeout(HELLO_TIMEOUT_S)
            greeting = Greeting(connection, self._secret)
            hello = greeting.receive(self._pool, self._max_mailbox_bytes)
            connection.settimeout(None)
            self._answer_all(connection, hello, greeting)
        except HelloRefused as refused:
            logger.warning("refusing a channel from %s: %s", refused.peer, refused)
        except OSError as error:
            logger.info("a channel ended: %s", error)
        except Exception:
            logger.exception("a channel failed")
        finally:
            with self._lock:
                self._connections.discard(connection)
            connection.close()
            if hello is not None and self._on_disconnect is not None:
                self._on_disconnect(hello)

    def _answer_all(self, connection: socket.socket, hello: Hello, greeting: Greeting) -> None:
        fd = create_memory(hello.request_bytes + hello.reply_bytes)
        try:
            memory = mmap.mmap(fd, hello.request_bytes + hello.reply_bytes)
            greeting.welcome(fd)
        finally:
            os.close(fd)
        inbox, outbox = Half(memory, 0, hello.request_bytes), Half(memory, hello.request_bytes, hello.reply_bytes)
        while data := connection.recv(FRAME_BYTES + 1):
            try:
                frame = unpack(data)
            except ValueError as error:
                logger.warning("closing the channel of %s: %s", hello.instance_id, error)
                return
            connection.send(self._answer(hello, frame, inbox, outbox).pack())

    def _answer(self, hello: Hello, frame: Frame, inbox: Half, outbox: Half) -> Frame:
        try:
            if not frame.fits(inbox.size):
                raise ValueError("the message does not fit in the mailbox")
            payload = inbox.payload(frame.payload_start, frame.payload_bytes)
            answer = self._handler(hello, Request(frame.kind, inbox.header(frame.header_bytes), payload))
            return Frame(frame.sequence, frame.kind, len(answer.header), outbox.write(answer.header, answer.payload))
        except Exception as error:
            logger.exception("message %d of %s failed", frame.kind, hello.instance_id)
            sentence = f"{type(error).__name__}: {error}".encode()[: outbox.size]
            return Frame(frame.sequence, ERROR_KIND, len(sentence), outbox.write(sentence, ()) * 0)


def _bind(path: Path) -> socket.socket:
    if len(str(path).encode()) > MAX_SOCKET_PATH_BYTES:
        raise UserError(
            f"the socket path {path} is longer than {MAX_SOCKET_PATH_BYTES} bytes: choose a shorter run_dir"
        )
    path.unlink(missing_ok=True)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        listening.bind(str(path))
        path.chmod(0o600)  # nobody listens before listen(): no other user can have come in
        listening.listen(64)
    except OSError as error:
        listening.close()
        raise UserError(f"cannot listen at {path}: {error.strerror}") from None
    return listening
