"""Gives a request to an instance with room, and to another one where that is lost."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import NamedTuple

from megatron_distkv import metrics
from megatron_distkv.clock import Clock
from megatron_distkv.config.admission import AdmissionConfig
from megatron_distkv.log import get_logger
from megatron_distkv.messages import InstanceStatus, NewRequest, TokenOutput
from megatron_distkv.pool import Member
from megatron_distkv.sampling_params import SamplingParams
from megatron_distkv.server.admission import Admission
from megatron_distkv.server.attempt import PATIENCE_S, Attempt, Life, life_of
from megatron_distkv.server.engine_client import EngineClient
from megatron_distkv.server.errors import ApiError, HandedElsewhere, InstanceLost, InstanceSilent
from megatron_distkv.server.placement import placed
from megatron_distkv.server.pool_view import GatewayView, request_socket_of
from megatron_distkv.server.receipt import Receipt

logger = get_logger(__name__)


class Routed(NamedTuple):
    """An output, and what all instances of the request have told of their parts so far."""

    output: TokenOutput
    receipt: Receipt


class Router:
    def __init__(
        self, view: GatewayView, config: AdmissionConfig, clock: Clock, patience_s: float = PATIENCE_S
    ) -> None:
        self._view = view
        self._clock = clock
        self._admission = Admission(config, view, clock)
        self._patience_s = patience_s
        self._clients: dict[Life, EngineClient] = {}
        view.when_looked.append(self._give_up_the_dead)

    async def generate(
        self, prompt_token_ids: list[int], sampling: SamplingParams, pinned: str | None = None
    ) -> AsyncGenerator[Routed, None]:
        """Outputs of one sequence, whoever computes them. Raises ApiError.

        When an instance is lost, another goes on from the tokens that are out already: a draw depends on the request's
        seed and the position only, so the client sees a pause. `pinned` names the instance that must take it.
        """
        attempt = Attempt(prompt_token_ids, sampling, pinned, self._clock, self._patience_s)
        self._admission.require_possible(attempt)
        while True:
            async with placed(attempt, self._admission) as record:
                try:
                    async with contextlib.aclosing(self._ask(record, attempt.request(record))) as outputs:
                        async for output in outputs:
                            routed = self._note(attempt, record, output)
                            if output.token_ids or output.finish_reason is not None:
                                yield routed
                    return
                except HandedElsewhere as left:
                    attempt.note_handed_over(record, left)
                except InstanceLost as lost:
                    logger.warning(
                        "%s: %d tokens of a request are out; trying another instance", lost, attempt.num_sent
                    )
                    metrics.RESUMED.inc()
                    attempt.note_lost(record, has_died=not isinstance(lost, InstanceSilent))
                except ApiError as error:
                    attempt.note_refused(record, error)

    def _note(self, attempt: Attempt, record: Member, output: TokenOutput) -> Routed:
        had_to_prefill = attempt.num_prefill_tokens > 0
        attempt.note(output)
        if had_to_prefill and not attempt.num_prefill_tokens:
            self._admission.note_prefilled(attempt)
        if output.finish_reason is None:
            return Routed(output, attempt.receipt.add(record.instance, None))
        attempt.note_part(record)
        return Routed(output, attempt.receipt)

    async def statuses(self, within_s: float) -> list[InstanceStatus]:
        """Of this gateway's instances, as far as they have ever told."""
        clients = [self._client(record) for record in self._view.instances]
        told = await asyncio.gather(*(client.status(within_s) for client in clients))
        return [status for status in told if status is not None]

    async def close(self) -> None:
        for client in self._clients.values():
            await client.close()

    def _ask(self, record: Member, request: NewRequest) -> AsyncGenerator[TokenOutput, None]:
        return self._client(record).generate(request)

    def _client(self, record: Member) -> EngineClient:
        life = life_of(record)
        if life not in self._clients:
            self._clients[life] = EngineClient(record.instance, request_socket_of(record))
        return self._clients[life]

    def _give_up_the_dead(self) -> None:
        """An instance whose lease has ended may hang with its socket open."""
        picture = self._view.picture
        living = {life_of(record) for record in picture.live} if picture is not None else set(self._clients)
        for life in [life for life in self._clients if life not in living]:
            self._clients.pop(life).give_up()
