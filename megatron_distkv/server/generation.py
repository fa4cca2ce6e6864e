"""One choice of an answer: tokens from the router become text, cut at stop strings."""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

from megatron_distkv import metrics
from megatron_distkv.clock import Clock
from megatron_distkv.messages import TokenLogprobs
from megatron_distkv.sampling_params import SamplingParams
from megatron_distkv.server.errors import ApiError
from megatron_distkv.server.receipt import Receipt
from megatron_distkv.server.router import Router
from megatron_distkv.server.stop_strings import StopStrings
from megatron_distkv.server.tokenizer import Tokenizer


@dataclass
class Piece:
    """The next bit of one choice. The last has a finish reason."""

    choice: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    receipt: Receipt | None = None


async def generate(
    router: Router,
    tokenizer: Tokenizer,
    prompt_token_ids: list[int],
    sampling: SamplingParams,
    stops: Sequence[str],
    clock: Clock,
    *,
    choice: int = 0,
    pinned: str | None = None,
) -> AsyncGenerator[Piece, None]:
    """Pieces of one choice; raises ApiError."""
    detokenizer, stop_strings, times = tokenizer.detokenizer(), StopStrings(stops), _Times(clock)
    metrics.PROMPT_TOKENS.inc(len(prompt_token_ids))
    outputs = router.generate(prompt_token_ids, sampling, pinned)
    try:
        async for output, receipt in outputs:
            times.note(len(output.token_ids))
            reason = output.finish_reason
            ends_in_stop_token = reason == "stop"
            shown = output.token_ids[:-1] if ends_in_stop_token else output.token_ids
            text = stop_strings.add("".join(detokenizer.add(token_id) for token_id in shown))
            if reason is not None and not stop_strings.has_stopped:
                text += stop_strings.add(detokenizer.flush()) + stop_strings.flush()
            if stop_strings.has_stopped:
                reason = "stop"
            yield Piece(choice, text, output.token_ids, output.logprobs or [], reason, receipt)
            if reason is not None:
                times.finish(reason)
                return
    except ApiError as error:
        times.finish(error.code or "refused")
        raise
    finally:
        await outputs.aclose()


class _Times:
    """Of one choice, for the metrics."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._start_s = self._clock.monotonic_s()
        self._first_s = 0.0
        self._num_tokens = 0

    def note(self, num_tokens: int) -> None:
        metrics.OUTPUT_TOKENS.inc(num_tokens)
        if self._num_tokens == 0 and num_tokens:
            self._first_s = self._clock.monotonic_s()
            metrics.TTFT_SECONDS.observe(self._first_s - self._start_s)
        self._num_tokens += num_tokens

    def finish(self, outcome: str) -> None:
        metrics.REQUESTS.labels(outcome).inc()
        if self._num_tokens > 1:
            metrics.TPOT_SECONDS.observe((self._clock.monotonic_s() - self._first_s) / (self._num_tokens - 1))
