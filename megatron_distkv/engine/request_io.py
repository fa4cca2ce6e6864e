"""The instance's door for gateways: a unix socket, served by one asyncio thread beside the engine's."""

import asyncio
import contextlib
import itertools
import queue
import socket
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import msgspec

from megatron_distkv import framing
from megatron_distkv.background import Fatal
from megatron_distkv.errors import UserError
from megatron_distkv.log import get_logger
from megatron_distkv.messages import FromInstance, ToInstance
from megatron_distkv.shortages import calm_shortages
from megatron_distkv.transport import SocketFile

logger = get_logger(__name__)
# A client that does not read has this long to take what was sent to it, when the door closes.
LAST_WORDS_S = 0.5


class ClientLeft(NamedTuple):
    """A client's last word: nobody waits for its requests any more."""


class Inbound(NamedTuple):
    client: int
    message: ToInstance | ClientLeft


class RequestIO:
    """`inbox` is read by the engine's thread; `fatal` says that nobody can come in any more. Raises UserError."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._socket = _bind(path)
        self._file = SocketFile(path)
        self.inbox: queue.SimpleQueue[Inbound] = queue.SimpleQueue()
        self._writers: dict[int, asyncio.StreamWriter] = {}
        self._clients = itertools.count()
        self.fatal = Fatal()
        self._loop = asyncio.new_event_loop()
        self._closing = asyncio.Event()
        self._is_listening = threading.Event()
        self._thread = threading.Thread(target=self._run, name="requests", daemon=True)
        self._thread.start()
        self._is_listening.wait()
        self.fatal.raise_if_any()

    def send(self, client: int, messages: Iterable[FromInstance]) -> None:
        """From the engine's thread, which wakes the other one once for all of them; never waits for a slow client."""
        data = b"".join(framing.pack(message) for message in messages)
        with contextlib.suppress(RuntimeError):  # the loop has ended: so have the clients
            self._loop.call_soon_threadsafe(self._write, client, data)

    def close(self) -> None:
        """Clients have a moment to take their last messages."""
        with contextlib.suppress(RuntimeError):  # it has ended by itself
            self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join()
        self._file.remove()

    def _write(self, client: int, data: bytes) -> None:
        writer = self._writers.get(client)
        if writer is not None:
            writer.write(data)

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._serve_all())
        except BaseException as error:
            logger.critical("no gateway can come in at %s any more: %s", self._path, error, exc_info=error)
            self.fatal.report(error)
        finally:
            self._is_listening.set()

    async def _serve_all(self) -> None:
        calm_shortages(self._loop, logger)
        server = await asyncio.start_unix_server(self._serve, sock=self._socket)
        self._is_listening.set()
        await self._closing.wait()
        self._loop.remove_reader(self._socket)  # asyncio loses a connection that it accepts as its server closes
        await self._hang_up()
        server.close()

    async def _hang_up(self) -> None:
        """Every conversation ends by itself, as if its client had left: first those that take what is on its way."""
        for end in (_close, _abort):
            for writer in self._writers.values():
                end(writer)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LAST_WORDS_S):
                    while conversations := asyncio.all_tasks() - {asyncio.current_task()}:
                        await asyncio.wait(conversations)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        client = next(self._clients)
        self._writers[client] = writer
        if self._closing.is_set():
            writer.close()
        decoder = msgspec.msgpack.Decoder(ToInstance)
        try:
            while True:
                self.inbox.put(Inbound(client, await framing.read(reader, decoder)))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        except (ValueError, msgspec.MsgspecError) as error:
            logger.warning("closing a client's connection: %s", error)
        finally:
            del self._writers[client]
            self.inbox.put(Inbound(client, ClientLeft()))
            writer.close()


def _bind(path: Path) -> socket.socket:
    """Only this user may connect; raises UserError."""
    path.unlink(missing_ok=True)
    door = socket.socket(socket.AF_UNIX)
    try:
        door.bind(str(path))
        path.chmod(0o600)  # nobody listens before listen(): no other user can have come in
    except OSError as error:
        door.close()
        raise UserError(f"cannot listen at {path}: {error.strerror or error}") from None
    return door


def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()


def _abort(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()
