"""Picks the instance for a request, and another one where the first is full or gone before it said a word."""

import itertools
import uuid
from collections.abc import AsyncGenerator
from typing import NamedTuple

from megatron_distkv.ledger import InstanceRecord
from megatron_distkv.log import get_logger
from megatron_distkv.messages import NewRequest, TokenOutput
from megatron_distkv.rblock import num_rblocks_for
from megatron_distkv.sampling_params import SamplingParams
from megatron_distkv.server.engine_client import EngineClient
from megatron_distkv.server.errors import ApiError, InstanceLost
from megatron_distkv.server.pool_view import PoolView, eos_token_ids_of, request_socket_of

logger = get_logger(__name__)


class Routed(NamedTuple):
    """An output, and the instance that it came from."""

    instance_id: str
    output: TokenOutput


class Router:
    def __init__(self, view: PoolView) -> None:
        self._view = view
        self._clients: dict[str, EngineClient] = {}
        self._num_sent: dict[str, int] = {}  # requests in flight by instance: fresher than any heartbeat
        self._turn = itertools.count()

    async def generate(
        self, prompt_token_ids: list[int], sampling: SamplingParams, pinned: str | None = None
    ) -> AsyncGenerator[Routed, None]:
        """Outputs of one sequence. Raises ApiError; InstanceLost when it had already begun to speak.

        `pinned` names the instance that must take it.
        """
        refusal: ApiError | None = None
        for record in self._by_preference(len(prompt_token_ids) + sampling.max_tokens, pinned):
            request = NewRequest(uuid.uuid4().hex[:16], prompt_token_ids, sampling, eos_token_ids_of(record))
            has_spoken = False
            try:
                async for output in self._ask(record, request):
                    has_spoken = True
                    yield Routed(record.instance, output)
                return
            except InstanceLost as lost:
                if has_spoken:
                    raise
                logger.warning("%s: trying another instance", lost)
            except ApiError as error:
                if error.status not in (429, 503):
                    raise
                refusal = error
        raise refusal or ApiError(503, "no instance of the pool answers", kind="server_error", code="no_instance")

    async def close(self) -> None:
        for client in self._clients.values():
            await client.close()

    async def _ask(self, record: InstanceRecord, request: NewRequest) -> AsyncGenerator[TokenOutput, None]:
        name = record.instance
        if name not in self._clients:
            self._clients[name] = EngineClient(name, request_socket_of(record))
        self._num_sent[name] = self._num_sent.get(name, 0) + 1
        outputs = self._clients[name].generate(request)
        try:
            async for output in outputs:
                yield output
        finally:
            self._num_sent[name] -= 1
            await outputs.aclose()

    def _by_preference(self, num_tokens: int, pinned: str | None) -> list[InstanceRecord]:
        """Instances that can hold all of it alone come first, the least busy of them; then those with most free."""
        records = [record for record in self._view.instances if pinned in (None, record.instance)]
        if pinned is not None and not records:
            raise ApiError(400, f"no live instance is called {pinned!r}", param="instance")
        turn = next(self._turn)
        records = records[turn % max(1, len(records)) :] + records[: turn % max(1, len(records))]

        def rank(record: InstanceRecord) -> tuple[bool, int, int]:
            needed = num_rblocks_for(num_tokens, int(record.info["rblock_size"]))
            must_borrow = record.free < needed
            busy = self._num_sent.get(record.instance, 0)
            return must_borrow, -record.free if must_borrow else busy, busy

        return sorted(records, key=rank)
