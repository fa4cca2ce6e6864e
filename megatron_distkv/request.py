"""One request inside an instance: its tokens, how many of them have their KV computed, and how it ended."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from megatron_distkv import metrics
from megatron_distkv.clock import Clock
from megatron_distkv.sampling_params import SamplingParams


class RequestStatus(StrEnum):
    WAITING = "waiting"
    RUNNING = "running"
    LEAVING = "leaving"  # stands still: the last of it goes to another instance
    FINISHED = "finished"


class FinishReason(StrEnum):
    """Why a request ended; the first two are OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


@dataclass(eq=False)
class Request:
    """There is no prefill or decode phase: each step lets the computed tokens catch up with `num_tokens`.

    |<------------- prompt ------------->|<--- output --->|
    |<--------- num_computed_tokens -------->|<- to do -->|
            |<- lost: to do first ->|

    Where KV is lost with a creditor, only that range is computed again, in order, before anything new.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    eos_token_ids: frozenset[int] = frozenset()
    arrival_s: float = 0.0  # by the clock of the instance that has it
    output_token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    lost_ranges: list[range] = field(default_factory=list)  # below num_computed_tokens: in order, apart, not empty
    status: RequestStatus = RequestStatus.WAITING
    finish_reason: FinishReason | None = None
    is_begun: bool = False  # some step of this instance has computed a part of it
    sampling_seed: int = 0
    kv_dtype: str = ""
    num_preemptions: int = 0
    preempted_at_s: float = float("-inf")  # the last time
    num_recomputed_tokens: int = 0
    num_tokens_at_losses: int = 0  # what starting over at each loss would have computed again
    max_local_rblocks: int = 0
    max_host_rblocks: int = 0
    max_borrowed_rblocks: dict[str, int] = field(default_factory=dict)
    local_rblock_s: float = 0.0
    host_rblock_s: float = 0.0
    borrowed_rblock_s: dict[str, float] = field(default_factory=dict)  # by lender
    remote_attention_s: float = 0.0

    def __post_init__(self) -> None:
        if self.sampling.seed is not None:
            self.sampling_seed = self.sampling.seed
        if self.output_token_ids:  # another instance computed them, and is gone
            self.num_recomputed_tokens = self.num_tokens_at_losses = self.num_tokens - 1

    def arrive(self, clock: Clock) -> None:
        """An instance takes it in: its age counts from now, and it draws from a seed of its own, if it has none."""
        self.arrival_s = clock.monotonic_s()
        if self.sampling.seed is None:
            self.sampling_seed = clock.random.getrandbits(63)

    @property
    def importance(self) -> tuple[int, float]:
        """Sorts the most important, earliest request first."""
        return self.sampling.priority, self.arrival_s

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_lost_tokens(self) -> int:
        return sum(len(lost) for lost in self.lost_ranges)

    @property
    def num_to_compute(self) -> int:
        return self.num_tokens - self.num_computed_tokens + self.num_lost_tokens

    @property
    def num_prefill_tokens_left(self) -> int:
        """0 while it decodes: the one token that it computes then is no prompt's."""
        return self.num_to_compute if self.num_to_compute > 1 else 0

    @property
    def next_range(self) -> range:
        """Positions whose KV is computed next; all positions before it have theirs."""
        return self.lost_ranges[0] if self.lost_ranges else range(self.num_computed_tokens, self.num_tokens)

    def computed_ranges(self) -> list[range]:
        """Positions that have their KV."""
        starts = [0, *(lost.stop for lost in self.lost_ranges)]
        ends = [*(lost.start for lost in self.lost_ranges), self.num_computed_tokens]
        return [range(start, end) for start, end in zip(starts, ends, strict=True) if start < end]

    @property
    def max_total_tokens(self) -> int:
        """The most tokens whose KV this request can ever need (the last sampled token's KV is never computed)."""
        return len(self.prompt_token_ids) + self.sampling.max_tokens - 1

    def token_ids(self, start: int, end: int) -> list[int]:
        """Tokens at positions `[start, end)` of prompt and output together."""
        num_prompt = len(self.prompt_token_ids)
        if end <= num_prompt:
            return self.prompt_token_ids[start:end]
        if start >= num_prompt:
            return self.output_token_ids[start - num_prompt : end - num_prompt]
        return self.prompt_token_ids[start:] + self.output_token_ids[: end - num_prompt]

    def append_token(self, token_id: int) -> None:
        """Add a sampled token and finish the request where it was the last one."""
        self.output_token_ids.append(token_id)
        if token_id in self.sampling.stop_token_ids or (
            token_id in self.eos_token_ids and not self.sampling.ignore_eos
        ):
            self.finish(FinishReason.STOP)
        elif len(self.output_token_ids) >= self.sampling.max_tokens:
            self.finish(FinishReason.LENGTH)

    def note_computed(self, num_tokens: int) -> None:
        """The first `num_tokens` of `next_range` have their KV now."""
        if not self.lost_ranges:
            self.num_computed_tokens += num_tokens
        elif left := self.lost_ranges.pop(0)[num_tokens:]:
            self.lost_ranges.insert(0, left)

    def lose(self, *lost: range) -> None:
        """The KV of these positions is gone: compute it again from the tokens, prompt and output alike."""
        num_before = self.num_computed_tokens - self.num_lost_tokens
        self.num_tokens_at_losses += num_before
        kept = self.computed_ranges()
        for gone in lost:
            kept = [piece for have in kept for piece in _without(have, gone)]
        self.num_computed_tokens = kept[-1].stop if kept else 0
        self.lost_ranges = gaps_before(kept)
        num_gone = num_before - sum(len(piece) for piece in kept)
        self.num_recomputed_tokens += num_gone
        metrics.RECOMPUTED_TOKENS.inc(num_gone)

    def start_over(self) -> None:
        """All its KV is gone."""
        self.status = RequestStatus.WAITING
        self.lose(range(self.num_computed_tokens))
        self.num_preemptions += 1
        metrics.PREEMPTIONS.inc()

    def finish(self, reason: FinishReason) -> None:
        self.status = RequestStatus.FINISHED
        self.finish_reason = reason


def gaps_before(pieces: Sequence[range]) -> list[range]:
    """What lies before and between pieces that are in order and apart."""
    edges = [0, *(edge for piece in pieces for edge in (piece.start, piece.stop))]
    gaps = zip(edges[0::2], edges[1::2], strict=False)
    return [range(start, end) for start, end in gaps if start < end]


def _without(have: range, lost: range) -> list[range]:
    """What is left of `have`, in order."""
    before = range(have.start, min(have.stop, lost.start))
    after = range(max(have.start, lost.stop), have.stop)
    return [piece for piece in (before, after) if piece]
