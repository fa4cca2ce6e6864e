"""Answers in OpenAI's shape, whole or as server-sent events, from the pieces of all choices."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from megatron_distkv.clock import Clock
from megatron_distkv.messages import TokenLogprobs
from megatron_distkv.server.errors import ApiError
from megatron_distkv.server.generation import Piece
from megatron_distkv.server.receipt import Receipt
from megatron_distkv.server.tokenizer import Tokenizer

PieceStream = AsyncGenerator[Piece, None]


@dataclass
class Choice:
    """What has come of one choice so far."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    receipt: Receipt = field(default_factory=Receipt)

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.token_ids += piece.token_ids
        self.logprobs += piece.logprobs
        self.finish_reason = piece.finish_reason
        self.receipt = piece.receipt or self.receipt


class Shape(Protocol):
    """How an endpoint lays out its answer."""

    object_name: str
    chunk_name: str
    id_prefix: str

    def choice(self, choice: Choice, tokenizer: Tokenizer) -> dict[str, Any]: ...
    def first_chunk(self, index: int) -> dict[str, Any] | None: ...
    def chunk(self, piece: Piece, text_so_far: str, tokenizer: Tokenizer) -> dict[str, Any]: ...


@dataclass
class Answer:
    """One answer to one HTTP request."""

    shape: Shape
    tokenizer: Tokenizer
    model: str
    num_prompt_tokens: int
    streams: Sequence[PieceStream]
    clock: Clock
    with_token_ids: bool = False
    id: str = ""
    created: int = 0

    def __post_init__(self) -> None:
        self.id = f"{self.shape.id_prefix}-{self.clock.random.getrandbits(128):032x}"
        self.created = self.clock.unix_ms() // 1000
        self._choices = [Choice(index) for index in range(len(self.streams))]
        # The same in each event of a stream, and most of it.
        self._chunk_head = msgspec.json.encode(self._head(self.shape.chunk_name)).removesuffix(b"}")

    async def whole(self) -> dict[str, Any]:
        async with contextlib.aclosing(merge_streams(self.streams)) as pieces:
            async for piece in pieces:
                self._choices[piece.choice].add(piece)
        return {
            **self._head(self.shape.object_name),
            "choices": [self._with_ids(self.shape.choice(x, self.tokenizer), x.token_ids) for x in self._choices],
            "usage": self._usage(),
        }

    async def events(self, *, with_usage: bool) -> AsyncGenerator[bytes, None]:
        """Server-sent events. Raises ApiError before the first; a later error is the last event before [DONE]."""
        has_begun = False
        try:
            async with contextlib.aclosing(merge_streams(self.streams)) as pieces:
                async for piece in pieces:
                    if not has_begun:
                        has_begun = True
                        for event in self._first_events():
                            yield event
                    so_far = self._choices[piece.choice].text
                    self._choices[piece.choice].add(piece)
                    chunk = self.shape.chunk(piece, so_far, self.tokenizer)
                    yield self._event([self._with_ids(chunk, piece.token_ids)])
            if with_usage:
                yield self._event([], usage=self._usage())
        except ApiError as error:
            if not has_begun:
                raise
            yield b"data: %b\n\n" % msgspec.json.encode(error.body())
        yield b"data: [DONE]\n\n"

    def _with_ids(self, choice: dict[str, Any], token_ids: list[int]) -> dict[str, Any]:
        return {**choice, "token_ids": token_ids} if self.with_token_ids else choice

    def _first_events(self) -> list[bytes]:
        chunks = [self.shape.first_chunk(index) for index in range(len(self.streams))]
        return [self._event([chunk]) for chunk in chunks if chunk is not None]

    def _head(self, name: str) -> dict[str, Any]:
        return {"id": self.id, "object": name, "created": self.created, "model": self.model}

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        tail = msgspec.json.encode({"choices": choices, **more}).removeprefix(b"{")
        return b"data: %b,%b\n\n" % (self._chunk_head, tail)

    def _usage(self) -> dict[str, Any]:
        """OpenAI's counts and, ours, where the rBlocks of each choice lay."""
        num_output = sum(len(choice.token_ids) for choice in self._choices)
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": num_output,
            "total_tokens": self.num_prompt_tokens + num_output,
            "kv": [_receipt(choice) for choice in self._choices],
        }


def _receipt(choice: Choice) -> dict[str, Any]:
    kv, instances, num_untold = choice.receipt
    return {
        "instance": instances[-1] if instances else "",
        "instances": list(instances),
        "num_untold_parts": num_untold,
        "kv_dtype": kv.kv_dtype,
        "max_local_rblocks": kv.max_local_rblocks,
        "max_host_rblocks": kv.max_host_rblocks,
        "max_borrowed_rblocks": kv.max_borrowed_rblocks,
        "lenders": sorted(kv.borrowed_rblock_s),
        "local_rblock_s": round(kv.local_rblock_s, 6),
        "host_rblock_s": round(kv.host_rblock_s, 6),
        "borrowed_rblock_s": round(sum(kv.borrowed_rblock_s.values()), 6),
        "remote_attention_s": round(kv.remote_attention_s, 6),
        "num_preemptions": kv.num_preemptions,
        "num_recomputed_tokens": kv.num_recomputed_tokens,
        "num_tokens_at_losses": kv.num_tokens_at_losses,
    }


async def merge_streams(streams: Sequence[PieceStream]) -> AsyncGenerator[Piece, None]:
    """Pieces of all streams as they come. An error of one, or leaving early, ends them all."""
    if len(streams) == 1:  # as nearly always: nothing to merge, and no task and queue to pay for with each token
        async with contextlib.aclosing(streams[0]) as only:
            async for piece in only:
                yield piece
        return
    queue: asyncio.Queue[Piece | BaseException | None] = asyncio.Queue()

    async def pump(stream: PieceStream) -> None:
        try:
            async for piece in stream:
                queue.put_nowait(piece)
            queue.put_nowait(None)
        except ApiError as error:
            queue.put_nowait(error)
        except Exception as error:
            queue.put_nowait(error)
            raise
        finally:
            await stream.aclose()

    tasks = [asyncio.create_task(pump(stream)) for stream in streams]
    try:
        num_running = len(tasks)
        while num_running:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                num_running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def or_disconnect(work: "asyncio.Future[Any]", receive: Callable[[], Awaitable[Any]]) -> Any | None:
    """The result of `work`, or None (and `work` cancelled) when the client leaves first.

    `receive`: ASGI's, of a request whose body has been read: its next message is that the client has left.
    """
    leaving = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait((work, leaving), return_when=asyncio.FIRST_COMPLETED)
        return work.result() if work.done() else None
    finally:
        for waiting in (work, leaving):
            waiting.cancel()
        await asyncio.gather(work, leaving, return_exceptions=True)


async def _left(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
