"""The listening side: a thread per connection answers its questions, one at a time."""

import contextlib
import errno
import socket
import ssl
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch

from megatron_distkv.address import Address, parse_address
from megatron_distkv.config.endpoint import Endpoint
from megatron_distkv.errors import DistkvError, FatalError, UserError
from megatron_distkv.log import get_logger
from megatron_distkv.shortages import Seldom
from megatron_distkv.transport.frame import ALIGNMENT, ERROR_KIND, Frame
from megatron_distkv.transport.handshake import Greeting, HelloRefused
from megatron_distkv.transport.hello import Hello
from megatron_distkv.transport.link import Link, PeerLeft, Wire
from megatron_distkv.transport.mailbox import MessageTooLong
from megatron_distkv.transport.nixl_link import NixlWire, nixl_package
from megatron_distkv.transport.pool_secret import OPEN_POOL
from megatron_distkv.transport.shared_link import DatagramWire
from megatron_distkv.transport.socket_file import SocketFile
from megatron_distkv.transport.stream_link import STALLED_S, StreamWire, set_options
from megatron_distkv.transport.tls import Tls, fingerprint_of_peer

logger = get_logger(__name__)
# A client that connects and says nothing must not hold a thread for ever.
HELLO_TIMEOUT_S = 5.0
# Nor may many of them: who is not proven yet is one of so many at most, and one more is turned away.
MAX_STRANGERS = 64
# When the system has no file descriptor, memory or thread for one more channel, the next try comes after this.
PAUSE_S = 0.1
# Of accept(): the listening socket itself is broken, and no other connection will come.
_BROKEN = {errno.EBADF, errno.EINVAL, errno.ENOTSOCK}
# A unix socket's path is at most this long.
MAX_SOCKET_PATH_BYTES = 107


class ChannelRequest(NamedTuple):
    """`payload` is a view into the mailbox, valid until the answer is returned.

    `certificate`: the fingerprint of the one that its sender has shown; "" where channels show none.
    """

    kind: int
    header: bytes
    payload: memoryview
    certificate: str = ""


class Answer(NamedTuple):
    header: bytes
    payload: Sequence[torch.Tensor] = ()


class _Failed(DistkvError):
    """A message that cannot be answered; the peer gets the sentence, and may send another message."""


Handler: TypeAlias = Callable[[Hello, ChannelRequest], Answer]
OnFatal: TypeAlias = Callable[[BaseException], None]


class Listener:
    """Accepts channels from who knows `pool` and its `secret`; each has a thread that runs `handler`.

    `address`: `unix:PATH`; `tcp://HOST:PORT`, which with `tls` speaks nothing but TLS; `nixl://HOST:PORT`. Raises
    UserError.

    `on_fatal` gets what this process must end for, from the thread that met it: a FatalError of the handler (its peer
    sees the channel close), or whatever ends the thread that accepts, so that nobody could come in any more.
    """

    def __init__(
        self,
        address: str,
        pool: str,
        handler: Handler,
        *,
        secret: bytes = OPEN_POOL,
        tls: Tls | None = None,
        on_disconnect: Callable[[Hello], None] | None = None,
        on_fatal: OnFatal | None = None,
        max_mailbox_bytes: int = 1 << 30,
    ) -> None:
        self._address = parse_address(address)
        self._pool = pool
        self._handler = handler
        self._secret = secret
        self._tls = tls
        self._on_disconnect = on_disconnect
        self._on_fatal = on_fatal
        self._max_mailbox_bytes = max_mailbox_bytes
        self._connections: set[socket.socket] = set()
        self._num_strangers = 0
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._shortage = Seldom(logger)
        self._socket = _listen(self._address)
        self._file = SocketFile(Path(self._address.unix_path)) if self._address.unix_path is not None else None
        threading.Thread(target=self._accept, name=f"listen {address}", daemon=True).start()

    def close(self) -> None:
        """Drop all channels (their peers see EOF) and remove the socket."""
        with self._lock:
            self._closing.set()
            connections = [self._socket, *self._connections]
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        if self._file is not None:
            self._file.remove()

    def _accept(self) -> None:
        try:
            while (connection := self._next()) is not None:
                self._take(connection)
        except BaseException as error:
            self._die(f"nobody can come in at {self._address} any more", error)

    def _next(self) -> socket.socket | None:
        """None: the listener is closed. Whatever a single connection, or the system, lacks for now is waited for."""
        while not self._closing.is_set():
            try:
                return self._socket.accept()[0]
            except OSError as error:
                if self._closing.is_set():
                    return None
                if error.errno in _BROKEN:
                    raise
                self._pause(error)
        return None

    def _pause(self, error: Exception) -> None:
        self._shortage.warn("no channel can be taken at %s for now (%s): trying again", self._address, error)
        self._closing.wait(PAUSE_S)

    def _take(self, connection: socket.socket) -> None:
        with self._lock:
            if self._closing.is_set() or self._num_strangers >= MAX_STRANGERS:
                connection.close()
                return
            self._num_strangers += 1
            self._connections.add(connection)
        try:
            threading.Thread(target=self._serve, args=(connection,), name="channel", daemon=True).start()
        except RuntimeError as error:  # as many threads as this process may have
            self._forget(connection)
            with self._lock:
                self._num_strangers -= 1
            self._pause(error)

    def _serve(self, connection: socket.socket) -> None:
        hello = None
        try:
            connection, hello, link = self._greet(connection)
            with contextlib.closing(link):
                self._answer_all(link, hello, fingerprint_of_peer(connection))
        except FatalError as error:
            self._die("a message broke what this process stands on", error)
        except Exception as error:
            _say_why(hello, error)
        finally:
            with self._lock:
                self._connections.discard(connection)
            connection.close()
            if hello is not None and self._on_disconnect is not None:
                self._on_disconnect(hello)

    def _die(self, sentence: str, error: BaseException) -> None:
        logger.critical("%s: %s: %s", sentence, type(error).__name__, error, exc_info=error)
        if self._on_fatal is not None:
            self._on_fatal(error)

    def _greet(self, connection: socket.socket) -> tuple[socket.socket, Hello, Link]:
        """The connection may be another one afterwards: TLS takes its place."""
        try:
            connection = self._inside_of_tls(connection)
            greeting = Greeting(self._wire(connection), self._secret)
            hello = greeting.receive(self._pool, self._max_mailbox_bytes)
            return connection, hello, greeting.welcome(hello)
        except BaseException:
            self._forget(connection)
            raise
        finally:
            with self._lock:
                self._num_strangers -= 1

    def _wire(self, connection: socket.socket) -> Wire:
        if self._address.endpoint is None:
            return DatagramWire(connection, HELLO_TIMEOUT_S)
        is_nixl = self._address.endpoint.carrier == "nixl"
        return (NixlWire if is_nixl else StreamWire)(connection, HELLO_TIMEOUT_S)

    def _inside_of_tls(self, connection: socket.socket) -> socket.socket:
        if self._address.endpoint is None:
            return connection
        connection.settimeout(HELLO_TIMEOUT_S)
        set_options(connection)
        if self._tls is None:
            return connection
        inside = self._tls.listening.wrap_socket(connection, server_side=True)  # takes the file descriptor over
        with self._lock:
            self._connections.discard(connection)
            self._connections.add(inside)
        return inside

    def _forget(self, connection: socket.socket) -> None:
        with self._lock:
            self._connections.discard(connection)
        connection.close()

    def _answer_all(self, link: Link, hello: Hello, certificate: str) -> None:
        while True:
            try:
                frame = link.hear(None)
            except ValueError as error:
                logger.warning("closing the channel of %s: %s", hello.instance_id, error)
                return
            try:
                answer = self._answer(hello, frame, link, certificate)
                link.send(frame.sequence, frame.kind, answer.header, answer.payload)
            except (_Failed, MessageTooLong) as error:
                logger.exception("message %d of %s failed", frame.kind, hello.instance_id)
                sentence = str(error).encode()[: hello.reply_bytes // ALIGNMENT * ALIGNMENT]
                link.send(frame.sequence, ERROR_KIND, sentence)

    def _answer(self, hello: Hello, frame: Frame, link: Link, certificate: str) -> Answer:
        try:
            header, payload = link.read(frame, STALLED_S)
        except ValueError as error:
            raise _Failed(f"{type(error).__name__}: {error}") from error
        try:
            return self._handler(hello, ChannelRequest(frame.kind, header, payload, certificate))
        except FatalError:
            raise
        except Exception as error:
            raise _Failed(f"{type(error).__name__}: {error}") from error


def _say_why(hello: Hello | None, error: Exception) -> None:
    """A channel has ended. Who leaves, or looks in without a word (a probe of a load balancer), is no news."""
    who = "somebody" if hello is None else hello.instance_id
    match error:
        case HelloRefused():
            logger.warning("refusing a channel from %s: %s", error.peer, error)
        case PeerLeft():
            logger.debug("%s: %s", who, error)
        case ConnectionError() | ssl.SSLEOFError() if hello is None:
            logger.debug("%s: %s", who, error)
        case OSError():
            logger.info("the channel of %s ended: %s", who, error)
        case _:
            logger.error("the channel of %s failed", who, exc_info=error)


def _listen(address: Address) -> socket.socket:
    """Raises UserError, one sentence."""
    if address.unix_path is not None:
        return _bind(Path(address.unix_path))
    assert address.endpoint is not None  # or it would be no address
    if address.endpoint.carrier == "nixl" and nixl_package() is None:
        raise UserError("NIXL is not installed here: pip install megatron-distkv[nixl], or leave out network.carrier")
    return _bind_host(address.endpoint)


def _bind_host(endpoint: Endpoint) -> socket.socket:
    family = socket.AF_INET6 if ":" in endpoint.host else socket.AF_INET
    try:
        return socket.create_server((endpoint.host, endpoint.port), family=family, backlog=64)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen at {endpoint}: {error}") from None


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
