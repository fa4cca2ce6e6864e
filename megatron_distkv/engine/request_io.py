"""The instance's door for gateways: a unix socket, served by one asyncio thread beside the engine's."""

import asyncio
import contextlib
import itertools
import queue
import threading
from pathlib import Path
from typing import NamedTuple

import msgspec

from megatron_distkv import framing
from megatron_distkv.errors import UserError
from megatron_distkv.log import get_logger
from megatron_distkv.messages import AbortRequest, FromInstance, NewRequest, ToInstance

logger = get_logger(__name__)


class Inbound(NamedTuple):
    client: int
    message: ToInstance


class RequestIO:
    """`inbox` is read by the engine's thread. A client that leaves aborts its requests."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.inbox: queue.SimpleQueue[Inbound] = queue.SimpleQueue()
        self._writers: dict[int, asyncio.StreamWriter] = {}
        self._clients = itertools.count()
        self._loop = asyncio.new_event_loop()
        self._path.unlink(missing_ok=True)
        try:
            server = self._loop.run_until_complete(asyncio.start_unix_server(self._serve, self._path))
        except OSError as error:
            raise UserError(f"cannot listen at {path}: {error}") from None
        self._thread = threading.Thread(target=self._run, args=(server,), name="requests", daemon=True)
        self._thread.start()

    def send(self, client: int, message: FromInstance) -> None:
        """From the engine's thread; never waits for a slow client."""
        with contextlib.suppress(RuntimeError):  # the loop has ended: so have the clients
            self._loop.call_soon_threadsafe(self._write, client, framing.pack(message))

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._path.unlink(missing_ok=True)

    def _write(self, client: int, data: bytes) -> None:
        writer = self._writers.get(client)
        if writer is not None:
            writer.write(data)

    def _run(self, server: asyncio.Server) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        server.close()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))
        for writer in self._writers.values():
            writer.close()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        client = next(self._clients)
        self._writers[client] = writer
        decoder = msgspec.msgpack.Decoder(ToInstance)
        request_ids: set[str] = set()
        try:
            while True:
                message = await framing.read(reader, decoder)
                if isinstance(message, NewRequest):
                    request_ids.add(message.request_id)
                self.inbox.put(Inbound(client, message))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        except (ValueError, msgspec.MsgspecError) as error:
            logger.warning("closing a client's connection: %s", error)
        finally:
            del self._writers[client]
            for request_id in request_ids:
                self.inbox.put(Inbound(client, AbortRequest(request_id)))
            writer.close()
