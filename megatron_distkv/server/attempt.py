"""What has become of one sequence so far: whom it was given to, and which of its tokens are out."""

from typing import NamedTuple

import msgspec

from megatron_distkv.clock import Clock
from megatron_distkv.messages import NewRequest, RequestKV, TokenOutput
from megatron_distkv.pool import Member
from megatron_distkv.sampling_params import SamplingParams
from megatron_distkv.server.errors import ApiError, HandedElsewhere
from megatron_distkv.server.receipt import Receipt

# A request whose instance was lost waits this long for another that can take it.
PATIENCE_S = 30.0
# Pictures of the pool that differ for longer than this differ not only in age.
DOUBT_S = 5.0

# An instance that dies while it computes a request may have died of it; so many in a row, and no other is given it.
MOST_DEATHS = 2
# The successor of an instance that leaves is looked for so long; then anybody is as good.
SUCCESSOR_PATIENCE_S = 2.0


class Life(NamedTuple):
    """One life of an instance: one that comes back under its name is another."""

    instance_id: str
    epoch: int


def life_of(record: Member) -> Life:
    return Life(record.instance, record.epoch)


class Attempt:
    def __init__(
        self,
        prompt_token_ids: list[int],
        sampling: SamplingParams,
        pinned: str | None,
        clock: Clock,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._clock = clock
        self._pinned = pinned
        self._patience_s = patience_s
        self._patient_until_s = float("-inf")
        self._successor = ""  # has this request's KV
        self._successor_until_s = float("-inf")
        self._handover_id = ""
        self._prompt_token_ids = prompt_token_ids
        # Every instance that computes a part of it must draw alike.
        seed = sampling.seed if sampling.seed is not None else clock.random.getrandbits(63)
        self._sampling = msgspec.structs.replace(sampling, seed=seed)
        self._sent: list[int] = []
        self._is_prefilled = False  # where it is now
        self._is_begun = False  # there
        self._lost: set[Life] = set()
        self._num_deaths = 0  # of instances in a row, without a new token between
        self._refused: set[Life] = set()
        self._refusal: ApiError | None = None
        self.arrival_s = self._clock.monotonic_s()
        self.receipt = Receipt()
        self._told: RequestKV | None = None
        self.request_id = ""  # of its present life
        self._doubted_since_s = float("inf")

    @property
    def pinned(self) -> str | None:
        """The one instance that may take it: the successor, for a moment, or whom the client named."""
        return self._successor if self._clock.monotonic_s() < self._successor_until_s else self._pinned

    @property
    def num_sent(self) -> int:
        return len(self._sent)

    @property
    def num_tokens_at_most(self) -> int:
        """Whose KV it can ever need (the last sampled token's KV is never computed)."""
        return len(self._prompt_token_ids) + self._sampling.max_tokens - 1

    @property
    def rank(self) -> tuple[int, float]:
        """In a queue: important ones first (a lower priority, as in vLLM), then the oldest."""
        return self._sampling.priority, self.arrival_s

    @property
    def lengths(self) -> str:
        return (
            f"prompt ({len(self._prompt_token_ids)} tokens) and max_tokens ({self._sampling.max_tokens}) need a "
            f"context of {self.num_tokens_at_most} tokens"
        )

    @property
    def num_tokens_now(self) -> int:
        """Those that there are, and the next, if that needs KV."""
        return min(len(self._prompt_token_ids) + self.num_sent + 1, self.num_tokens_at_most)

    @property
    def num_prefill_tokens(self) -> int:
        """What its instance has to compute before its next token; 0 once it has given one."""
        return 0 if self._is_prefilled else len(self._prompt_token_ids) + self.num_sent

    @property
    def has_lost(self) -> bool:
        return bool(self._lost)

    @property
    def is_patient(self) -> bool:
        """It has lost an instance, and others that refuse it now will be asked again."""
        return self._clock.monotonic_s() < self._patient_until_s

    def request(self, record: Member) -> NewRequest:
        """What this instance is asked: to go on from the tokens that are out."""
        handover_id = self._handover_id if record.instance == self._successor else ""
        self._successor_until_s = float("-inf")
        self._is_prefilled, self._is_begun = bool(handover_id), False
        self.request_id = f"{self._clock.random.getrandbits(64):016x}"
        return NewRequest(
            self.request_id,
            self._prompt_token_ids,
            self._sampling,
            list(record.info.eos_token_ids),
            list(self._sent),
            handover_id,
        )

    def note(self, output: TokenOutput) -> None:
        """Tokens, and what its instance tells of its part: with the last tokens, or when it gives the request up."""
        self._sent += output.token_ids
        self._is_begun = True
        if output.token_ids:
            self._is_prefilled, self._num_deaths = True, 0
        if output.kv is not None:
            self._told = output.kv

    def note_part(self, record: Member) -> None:
        """This instance's part is over: the request has ended, or the instance is lost."""
        self.receipt = self.receipt.add(record.instance, self._told)
        self._told = None

    def may_ask(self, record: Member) -> bool:
        return life_of(record) not in self._lost | self._refused

    @property
    def refusal(self) -> ApiError | None:
        """The last one."""
        return self._refusal

    def note_lost(self, record: Member, *, has_died: bool = True) -> None:
        """If the client named that instance, any other may go on now.

        Raises ApiError where it was the second in a row to die while it computed this request, before another token of
        it: a third is not risked. Who leaves in good order tells its part before it goes; who is silent has not died.
        """
        if has_died and self._is_begun and self._told is None:
            self._num_deaths += 1
        if self._num_deaths >= MOST_DEATHS:
            sentence = (
                f"{self._num_deaths} instances in a row were lost while they computed this request, with no token of "
                "it between them: it is given to no other, as it may be what ended them"
            )
            raise ApiError(502, sentence, kind="server_error", code="instance_lost")
        self._pinned = None
        self._is_prefilled = False
        self._lost.add(life_of(record))
        self.note_part(record)
        self._patient_until_s = self._clock.monotonic_s() + self._patience_s

    def note_handed_over(self, record: Member, left: HandedElsewhere) -> None:
        """The successor is asked first, and tells this instance's part with its own; without one, anybody."""
        self._told = self._told or RequestKV()
        self.note_lost(record)
        self._successor, self._handover_id = left.successor, left.handover_id
        self._successor_until_s = self._clock.monotonic_s() + (SUCCESSOR_PATIENCE_S if left.successor else 0.0)

    def note_refused(self, record: Member, error: ApiError) -> None:
        """Raises `error` unless another instance, or a later time, may answer differently.

        Too long is too long for the pool as that instance sees it, which may be another than the gateway saw a moment
        ago. Without any loss it is believed when it is said again after `DOUBT_S`.
        """
        is_too_long = error.code == "context_length_exceeded"
        if error.status not in (429, 503) and not is_too_long:
            raise error
        if is_too_long and not self._lost:
            self._doubted_since_s = min(self._doubted_since_s, self._clock.monotonic_s())
            if self._clock.monotonic_s() - self._doubted_since_s > DOUBT_S:
                raise error
        self._refused.add(life_of(record))
        self._refusal = error

    def doubt_afresh(self) -> None:
        """Nobody knows the pool now: who calls it too small may just have started."""
        self._doubted_since_s = float("inf")

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
