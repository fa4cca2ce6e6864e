"""The OpenAI-compatible gateway: routes, and what each does."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from prometheus_client import generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from megatron_distkv import metrics
from megatron_distkv.clock import Clock
from megatron_distkv.config.admission import AdmissionConfig
from megatron_distkv.errors import UserError
from megatron_distkv.log import get_logger
from megatron_distkv.pool import DebtLedger, render_debts
from megatron_distkv.server.answer import Answer, PieceStream, Shape, or_disconnect
from megatron_distkv.server.errors import ApiError, bad_request
from megatron_distkv.server.generation import generate
from megatron_distkv.server.pool_looks import PoolLooks
from megatron_distkv.server.pool_metrics import STATUS_WITHIN_S, PoolMetrics
from megatron_distkv.server.pool_view import GatewayView
from megatron_distkv.server.protocol import ChatRequest, CompletionRequest, GenerationRequest, parse_body
from megatron_distkv.server.router import Router
from megatron_distkv.server.shapes import ChatShape, CompletionShape
from megatron_distkv.server.tokenizer import Tokenizer, load_tokenizer
from megatron_distkv.shortages import calm_shortages

logger = get_logger(__name__)


class Gateway:
    def __init__(self, ledger: DebtLedger, served_model_name: str, admission: AdmissionConfig, clock: Clock) -> None:
        self._name = served_model_name
        self._clock = clock
        self._view = GatewayView(ledger, clock)
        self._looks = PoolLooks(self._view)
        self._router = Router(self._view, admission, clock)
        self._tokenizer: Tokenizer | None = None

    def app(self) -> Starlette:
        routes = [
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/health", self.health),
            Route("/metrics", self.metrics),
            Route("/debts", self.debts),
        ]
        handlers: dict[Any, Any] = {ApiError: _api_error, 404: _not_found, 405: _not_found}
        return Starlette(routes=routes, exception_handlers=handlers, lifespan=self._lifespan)

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        calm_shortages(asyncio.get_running_loop(), logger)
        await self._looks.start()
        yield
        await self._router.close()
        await self._looks.stop()

    # ------------------------------------------------------------------ generation

    async def completions(self, http: Request) -> Response:
        body: CompletionRequest = parse_body(CompletionRequest, await http.body())
        if body.echo or body.suffix or (body.best_of or 1) != 1:
            raise bad_request("echo, suffix and best_of are not supported")
        tokenizer = self._ready(body)
        prompts = [p if isinstance(p, list) else tokenizer.encode(p) for p in body.prompts()]
        streams = [
            self._stream(body, prompt, body.max_tokens, body.logprobs, place * body.n + number)
            for place, prompt in enumerate(prompts)
            for number in range(body.n)
        ]
        return await self._respond(http, body, CompletionShape(), sum(map(len, prompts)), streams)

    async def chat(self, http: Request) -> Response:
        body: ChatRequest = parse_body(ChatRequest, await http.body())
        tokenizer = self._ready(body)
        prompt = tokenizer.render_chat([message.as_template_input() for message in body.messages])
        streams = [self._stream(body, prompt, body.token_limit, body.num_logprobs, number) for number in range(body.n)]
        return await self._respond(http, body, ChatShape(), len(prompt), streams)

    def _ready(self, body: GenerationRequest) -> Tokenizer:
        if body.model not in ("", self._name):
            raise ApiError(
                404, f"the model {body.model!r} does not exist; this gateway serves {self._name!r}",
                param="model", code="model_not_found",
            )  # fmt: skip
        if self._tokenizer is None:
            records = self._view.instances
            if not records:
                raise ApiError(503, "no instance has joined the pool yet", kind="server_error", code="no_instance")
            info = records[0].info
            try:
                self._tokenizer = load_tokenizer(Path(info.model), info.vocab_size)
            except UserError as error:
                raise ApiError(500, str(error), kind="server_error", code="no_tokenizer") from None
        return self._tokenizer

    def _stream(
        self, body: GenerationRequest, prompt: list[int], max_tokens: int, logprobs: int | None, choice: int
    ) -> PieceStream:
        assert self._tokenizer is not None
        sampling = body.sampling(max_tokens, logprobs, choice)
        return generate(
            self._router, self._tokenizer, prompt, sampling, body.stop_strings, self._clock,
            choice=choice, pinned=body.instance,
        )  # fmt: skip

    async def _respond(
        self, http: Request, body: GenerationRequest, shape: Shape, num_prompt_tokens: int, streams: list[PieceStream]
    ) -> Response:
        assert self._tokenizer is not None
        answer = Answer(
            shape, self._tokenizer, self._name, num_prompt_tokens, streams, self._clock, body.return_token_ids
        )
        if body.stream:
            begun = asyncio.ensure_future(_begun(answer.events(with_usage=body.wants_usage)))
            events = await or_disconnect(begun, http.receive)
            if events is None:
                return Response(status_code=499)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        whole = await or_disconnect(asyncio.ensure_future(answer.whole()), http.receive)
        return Response(status_code=499) if whole is None else JSONResponse(whole)

    # ------------------------------------------------------------------ the rest

    async def models(self, _: Request) -> Response:
        entry = {"id": self._name, "object": "model", "created": 0, "owned_by": "megatron-distkv"}
        return JSONResponse({"object": "list", "data": [entry]})

    async def health(self, _: Request) -> Response:
        names = [record.instance for record in self._view.instances]
        body = {
            "status": "stale" if self._view.is_stale else "ok" if names else "no instance",
            "last_look_s_ago": round(self._view.age_s, 3),
            "instances": names,
            "ledger_away": self._view.ledger_is_away,
        }
        return JSONResponse(body, status_code=200 if body["status"] == "ok" else 503)

    async def metrics(self, _: Request) -> Response:
        pool = PoolMetrics(self._view.members, await self._router.statuses(STATUS_WITHIN_S))
        text = generate_latest(metrics.REGISTRY) + generate_latest(pool)
        return Response(text, media_type="text/plain; version=0.0.4")

    async def debts(self, _: Request) -> Response:
        picture = self._view.picture
        return Response(render_debts(picture) if picture else "", media_type="text/plain")


async def _begun(events: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """Wait for the first event: a refusal then has its own HTTP status instead of an event in a 200."""
    return _chain(await anext(events), events)


async def _chain(first: bytes, rest: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    try:
        yield first
        async for event in rest:
            yield event
    finally:
        await rest.aclose()


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    headers = {"Retry-After": str(error.retry_after_s)} if error.retry_after_s is not None else None
    return JSONResponse(error.body(), status_code=error.status, headers=headers)


async def _not_found(http: Request, _: Exception) -> Response:
    error = ApiError(404, f"there is no {http.method} {http.url.path}", code="not_found")
    return JSONResponse(error.body(), status_code=404)
