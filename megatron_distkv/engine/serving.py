"""Feeds an instance from its request socket, and sends back what it computes."""

import queue
import threading
from collections import defaultdict
from collections.abc import Iterable
from typing import TypeAlias

from megatron_distkv import metrics
from megatron_distkv.engine.addresses import request_socket
from megatron_distkv.engine.instance import Instance
from megatron_distkv.engine.request_io import ClientLeft, Inbound, RequestIO
from megatron_distkv.log import get_logger
from megatron_distkv.messages import (
    AbortRequest,
    DrainInstance,
    HandedOver,
    NewRequest,
    RequestRefused,
    StatusQuery,
    TokenOutput,
)
from megatron_distkv.request import Request

logger = get_logger(__name__)
# An idle instance looks for the word to stop this often.
IDLE_WAIT_S = 0.2
_OfRequest: TypeAlias = TokenOutput | HandedOver | RequestRefused


class Serving:
    """The engine's thread: take requests, step, send tokens."""

    def __init__(self, instance: Instance) -> None:
        self._instance = instance
        self._io = RequestIO(request_socket(instance.config.run_dir, instance.config.instance_id))
        self._client_of: dict[str, int] = {}
        self._was_busy = False
        instance.when_begun = self._send

    def run(self, stop: threading.Event) -> None:
        try:
            while not stop.is_set() and not self._instance.is_drained:
                self._io.fatal.raise_if_any()
                self._take_messages()
                if self._instance.has_work:
                    self._was_busy = True
                    self._send([*self._instance.step(), *self._instance.take_final_notices()])
            self._send(self._instance.give_up_all())
        finally:
            self._io.close()

    def _take_messages(self) -> None:
        """All that wait; an idle instance waits for one, after checking its accounts."""
        try:
            while True:
                if self._instance.is_idle:
                    self._when_idle()
                    self._take(self._io.inbox.get(timeout=IDLE_WAIT_S))
                else:
                    self._take(self._io.inbox.get_nowait())
        except queue.Empty:
            return

    def _when_idle(self) -> None:
        if self._was_busy:
            self._was_busy = False
            self._instance.check_integrity()
        self._instance.note_idle()

    def _take(self, inbound: Inbound) -> None:
        match inbound.message:
            case NewRequest() as new:
                self._take_request(inbound.client, new)
            case AbortRequest(request_id):
                if self._client_of.get(request_id) == inbound.client:
                    self._abort(request_id)
            case ClientLeft():
                for request_id in [x for x, client in self._client_of.items() if client == inbound.client]:
                    self._abort(request_id)
            case DrainInstance(within_s):
                self._instance.drain(within_s)
            case StatusQuery(query_id):
                self._io.send(inbound.client, [self._instance.status(query_id)])

    def _take_request(self, client: int, new: NewRequest) -> None:
        request = Request(
            new.request_id,
            new.prompt_token_ids,
            new.sampling,
            frozenset(new.eos_token_ids),
            output_token_ids=list(new.output_token_ids),
        )
        if new.handover_id and self._instance.receive(request, new.handover_id):
            self._client_of[new.request_id] = client
            return
        refused = self._instance.refuse(request)
        if refused is not None:
            logger.info("refusing %s: %s", new.request_id, refused.message)
            self._io.send(client, [refused])
            return
        self._client_of[new.request_id] = client
        metrics.RECOMPUTED_TOKENS.inc(request.num_recomputed_tokens)  # what another instance had, and is gone with it
        self._instance.add(request)

    def _abort(self, request_id: str) -> None:
        del self._client_of[request_id]
        self._instance.abort(request_id)

    def _send(self, messages: Iterable[_OfRequest]) -> None:
        """A step's, to each gateway in one go."""
        of_client: defaultdict[int, list[_OfRequest]] = defaultdict(list)
        for message in messages:
            client = self._client_of.get(message.request_id)
            if client is not None:
                of_client[client].append(message)
                if not isinstance(message, TokenOutput) or message.finish_reason is not None:
                    del self._client_of[message.request_id]
        for client, theirs in of_client.items():
            self._io.send(client, theirs)
