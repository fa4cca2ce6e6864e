"""What has become of one sequence so far: whom it was given to, and which of its tokens are out."""

import random
import time
import uuid
from typing import NamedTuple

import msgspec

from megatron_distkv.ledger import InstanceRecord
from megatron_distkv.messages import NewRequest, TokenOutput
from megatron_distkv.sampling_params import SamplingParams
from megatron_distkv.server.errors import ApiError, HandedElsewhere
from megatron_distkv.server.pool_view import eos_token_ids_of

# The heir of an instance that leaves is looked for so long; then anybody is as good.
HEIR_PATIENCE_S = 2.0


class Life(NamedTuple):
    """One life of an instance: one that comes back under its name is another."""

    instance_id: str
    epoch: int


def life_of(record: InstanceRecord) -> Life:
    return Life(record.instance, record.epoch)


class Attempt:
    def __init__(self, prompt_token_ids: list[int], sampling: SamplingParams, pinned: str | None) -> None:
        self._pinned = pinned
        self._heir = ""  # has this request's KV
        self._heir_until_s = float("-inf")
        self._adoption_id = ""
        self._prompt_token_ids = prompt_token_ids
        # Every instance that computes a part of it must draw alike.
        seed = sampling.seed if sampling.seed is not None else random.getrandbits(63)
        self._sampling = msgspec.structs.replace(sampling, seed=seed)
        self._sent: list[int] = []
        self._lost: set[Life] = set()
        self._refused: set[Life] = set()
        self._refusal: ApiError | None = None

    @property
    def pinned(self) -> str | None:
        """The one instance that may take it: the heir, for a moment, or whom the client named."""
        return self._heir if time.monotonic() < self._heir_until_s else self._pinned

    @property
    def num_sent(self) -> int:
        return len(self._sent)

    @property
    def num_tokens_at_most(self) -> int:
        return len(self._prompt_token_ids) + self._sampling.max_tokens

    @property
    def has_lost(self) -> bool:
        return bool(self._lost)

    def request(self, record: InstanceRecord) -> NewRequest:
        """What this instance is asked: to go on from the tokens that are out."""
        adoption_id = self._adoption_id if record.instance == self._heir else ""
        self._heir_until_s = float("-inf")
        return NewRequest(
            uuid.uuid4().hex[:16],
            self._prompt_token_ids,
            self._sampling,
            eos_token_ids_of(record),
            list(self._sent),
            adoption_id,
        )

    def note(self, output: TokenOutput) -> None:
        self._sent += output.token_ids

    def may_ask(self, record: InstanceRecord) -> bool:
        return life_of(record) not in self._lost | self._refused

    def note_lost(self, record: InstanceRecord) -> None:
        self._lost.add(life_of(record))

    def note_handed_over(self, record: InstanceRecord, left: HandedElsewhere) -> None:
        """The heir is asked first; without one, anybody, and who was pinned is gone."""
        self.note_lost(record)
        self._pinned = None
        self._heir, self._adoption_id = left.successor, left.adoption_id
        self._heir_until_s = time.monotonic() + (HEIR_PATIENCE_S if left.successor else 0.0)

    def note_refused(self, record: InstanceRecord, error: ApiError) -> None:
        """Raises `error` unless another instance, or a later time, may answer differently."""
        may_fit_later = self.has_lost and error.code == "context_length_exceeded"
        if error.status not in (429, 503) and not may_fit_later:
            raise error
        self._refused.add(life_of(record))
        self._refusal = error

    def forget_refusals(self) -> None:
        self._refused.clear()

    def failure(self) -> ApiError:
        """Why nobody (else) takes it."""
        if self._sent:
            sentence = f"the instance was lost after {self.num_sent} tokens of this answer, and no other can go on"
            if self._refusal is not None:
                sentence += f": {self._refusal}"
            return ApiError(502, sentence, kind="server_error", code="instance_lost")
        if self._refusal is not None:
            return self._refusal
        if self.pinned is not None and not self._lost:
            return ApiError(400, f"no live instance is called {self.pinned!r}", param="instance")
        return ApiError(503, "no instance of the pool answers", kind="server_error", code="no_instance")
