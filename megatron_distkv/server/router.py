"""Picks the instance for a request, and another one where the first is full or gone."""

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator
from typing import NamedTuple

from megatron_distkv import metrics
from megatron_distkv.ledger import InstanceRecord, PoolSnapshot
from megatron_distkv.log import get_logger
from megatron_distkv.messages import NewRequest, TokenOutput
from megatron_distkv.rblock import num_rblocks_for
from megatron_distkv.sampling_params import SamplingParams
from megatron_distkv.server.attempt import Attempt, Life, life_of
from megatron_distkv.server.engine_client import EngineClient
from megatron_distkv.server.errors import ApiError, HandedElsewhere, InstanceLost
from megatron_distkv.server.pool_view import PoolView, request_socket_of

logger = get_logger(__name__)
# A request whose instance was lost waits this long for another that can take it ...
PATIENCE_S = 30.0
# ... and asks all of them again after this.
ASK_AGAIN_AFTER_S = 0.25


class Routed(NamedTuple):
    """An output, and the instance that it came from."""

    instance_id: str
    output: TokenOutput


class Router:
    def __init__(self, view: PoolView) -> None:
        self._view = view
        view.when_seen = self._give_up_the_dead
        self._clients: dict[Life, EngineClient] = {}
        self._num_sent: dict[str, int] = {}  # requests in flight by instance: fresher than any heartbeat
        self._turn = itertools.count()

    async def generate(
        self, prompt_token_ids: list[int], sampling: SamplingParams, pinned: str | None = None
    ) -> AsyncGenerator[Routed, None]:
        """Outputs of one sequence, whoever computes them. Raises ApiError.

        When an instance is lost, another goes on from the tokens that are out already: a draw depends on the request's
        seed and the position only, so the client sees a pause. `pinned` names the instance that must take it.
        """
        attempt = Attempt(prompt_token_ids, sampling, pinned)
        while (record := await self._next(attempt)) is not None:
            try:
                async for output in self._ask(record, attempt.request(record)):
                    attempt.note(output)
                    yield Routed(record.instance, output)
                return
            except HandedElsewhere as left:
                attempt.note_handed_over(record, left)
            except InstanceLost as lost:
                logger.warning("%s: %d tokens of a request are out; trying another instance", lost, attempt.num_sent)
                metrics.RESUMED.inc()
                attempt.note_lost(record)
            except ApiError as error:
                attempt.note_refused(record, error)
        raise attempt.failure()

    async def close(self) -> None:
        for client in self._clients.values():
            await client.close()

    async def _next(self, attempt: Attempt) -> InstanceRecord | None:
        """The next instance to ask, None when there is none left."""
        until_s = time.monotonic() + PATIENCE_S
        while True:
            for record in self._by_preference(attempt.num_tokens_at_most, attempt.pinned):
                if attempt.may_ask(record):
                    return record
            if not attempt.has_lost or time.monotonic() > until_s:
                return None
            await asyncio.sleep(ASK_AGAIN_AFTER_S)
            attempt.forget_refusals()

    async def _ask(self, record: InstanceRecord, request: NewRequest) -> AsyncGenerator[TokenOutput, None]:
        name, life = record.instance, life_of(record)
        if life not in self._clients:
            self._clients[life] = EngineClient(name, request_socket_of(record))
        self._num_sent[name] = self._num_sent.get(name, 0) + 1
        outputs = self._clients[life].generate(request)
        try:
            async for output in outputs:
                yield output
        finally:
            self._num_sent[name] -= 1
            await outputs.aclose()

    def _give_up_the_dead(self, snapshot: PoolSnapshot) -> None:
        """An instance whose lease has ended may hang with its socket open."""
        living = {life_of(record) for record in snapshot.live}
        for life in [life for life in self._clients if life not in living]:
            self._clients.pop(life).give_up()

    def _by_preference(self, num_tokens: int, pinned: str | None) -> list[InstanceRecord]:
        """Instances that can hold all of it alone come first, the least busy of them; then those with most free."""
        records = [record for record in self._view.instances if pinned in (None, record.instance)]
        turn = next(self._turn)
        records = records[turn % max(1, len(records)) :] + records[: turn % max(1, len(records))]

        def rank(record: InstanceRecord) -> tuple[bool, int, int]:
            needed = num_rblocks_for(num_tokens, int(record.info["rblock_size"]))
            must_borrow = record.free < needed
            busy = self._num_sent.get(record.instance, 0)
            return must_borrow, -record.free if must_borrow else busy, busy

        return sorted(records, key=rank)
