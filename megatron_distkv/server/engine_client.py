"""The gateway's connection to one instance: many requests over one socket."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import TypeAlias

import msgspec

from megatron_distkv import framing
from megatron_distkv.log import get_logger
from megatron_distkv.messages import (
    AbortRequest,
    FromInstance,
    HandedOver,
    InstanceStatus,
    NewRequest,
    RequestRefused,
    StatusQuery,
    TokenOutput,
)
from megatron_distkv.server.errors import HandedElsewhere, InstanceLost, InstanceSilent, from_refusal

logger = get_logger(__name__)
# A step's messages for a few hundred streams.
READ_BYTES = 1 << 16
_Answer: TypeAlias = TokenOutput | RequestRefused | HandedOver


class EngineClient:
    """Connects when first used, and again after a loss."""

    def __init__(self, instance_id: str, socket_path: Path) -> None:
        self.instance_id = instance_id
        self._socket_path = socket_path
        self._writer: asyncio.StreamWriter | None = None
        self._answers: dict[str, asyncio.Queue[_Answer | None]] = {}
        self._reading: asyncio.Task[None] | None = None
        self._connecting = asyncio.Lock()
        self._is_given_up = False
        self._status: InstanceStatus | None = None
        self._status_came = asyncio.Event()

    async def generate(self, request: NewRequest) -> AsyncGenerator[TokenOutput, None]:
        """Outputs until the last. Raises ApiError when refused, InstanceLost when the instance goes away.

        InstanceSilent: it has not ended, as far as is known. HandedElsewhere: it leaves in good order.

        Leaving the iterator early aborts the request.
        """
        await self._connect()
        answers: asyncio.Queue[_Answer | None] = asyncio.Queue()
        self._answers[request.request_id] = answers
        is_done = False
        try:
            self._send(request)
            while not is_done:
                answer = await answers.get()
                is_done = not isinstance(answer, TokenOutput) or answer.finish_reason is not None
                if answer is None and self._is_given_up:
                    raise InstanceSilent(f"instance {self.instance_id} is silent")
                if answer is None:
                    raise InstanceLost(f"instance {self.instance_id} is gone")
                if isinstance(answer, HandedOver):
                    raise HandedElsewhere(self.instance_id, answer.successor, answer.handover_id)
                if isinstance(answer, RequestRefused):
                    raise from_refusal(answer.code, answer.message)
                yield answer
        finally:
            self._answers.pop(request.request_id, None)
            if not is_done:
                with contextlib.suppress(InstanceLost):
                    self._send(AbortRequest(request.request_id))

    async def status(self, within_s: float) -> InstanceStatus | None:
        """What the instance says of itself; what it said last where it is busy, or gone; None: it never did."""
        with contextlib.suppress(TimeoutError, InstanceLost):
            async with asyncio.timeout(within_s):
                await self._connect()
                self._status_came.clear()
                self._send(StatusQuery(0))
                await self._status_came.wait()
        return self._status

    def give_up(self) -> None:
        """The instance counts as gone, whatever its socket says: all its requests raise InstanceSilent."""
        self._is_given_up = True
        if self._reading is not None:
            self._reading.cancel()

    async def close(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reading

    async def _connect(self) -> None:
        async with self._connecting:
            if self._writer is not None:
                return
            try:
                reader, self._writer = await asyncio.open_unix_connection(self._socket_path)
            except OSError as error:
                raise InstanceLost(f"instance {self.instance_id} cannot be reached: {error.strerror}") from None
            self._reading = asyncio.create_task(self._read(reader, self._writer))

    def _send(self, message: msgspec.Struct) -> None:
        if self._writer is None or self._writer.is_closing():
            raise InstanceLost(f"instance {self.instance_id} is gone")
        self._writer.write(framing.pack(message))

    async def _read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        frames = framing.Frames(msgspec.msgpack.Decoder(FromInstance))
        try:
            while data := await reader.read(READ_BYTES):
                for message in frames.add(data):
                    self._take(message)
            logger.warning("instance %s is gone", self.instance_id)
        except ConnectionError:
            logger.warning("instance %s is gone", self.instance_id)
        except (ValueError, msgspec.MsgspecError) as error:
            logger.error("instance %s sent garbage: %s", self.instance_id, error)
        finally:
            self._writer = None
            writer.close()
            for answers in self._answers.values():
                answers.put_nowait(None)

    def _take(self, message: _Answer | InstanceStatus) -> None:
        if isinstance(message, InstanceStatus):
            self._status = message
            self._status_came.set()
            return
        answers = self._answers.get(message.request_id)
        if answers is not None:
            answers.put_nowait(message)
