"""Which requests an instance takes: decided before any work is done."""

from collections.abc import Callable

from megatron_distkv.config.model import ModelConfig
from megatron_distkv.engine.scheduler import Scheduler
from megatron_distkv.messages import RequestRefused
from megatron_distkv.request import Request
from megatron_distkv.rmanager import RManager

_HOLDS = "the longest that the pool's memory holds now is"


class InstanceAdmission:
    """With `draining` True nothing is taken any more."""

    def __init__(
        self, model: ModelConfig, scheduler: Scheduler, rmanager: RManager, is_arriving: Callable[[str], bool]
    ) -> None:
        """`is_arriving`: whether a request of this id comes from another instance just now."""
        self._model = model
        self._scheduler = scheduler
        self._rmanager = rmanager
        self._is_arriving = is_arriving
        self.draining = False

    def refuse(self, request: Request) -> RequestRefused | None:
        """Why this request cannot be taken; None: it can."""
        reason = self._why_impossible(request) or self._why_not_now(request)
        return RequestRefused(request.request_id, *reason) if reason is not None else None

    def longest_context_tokens(self) -> int:
        longest = self._rmanager.longest_context_tokens()
        return longest if self._model.max_context_tokens is None else min(longest, self._model.max_context_tokens)

    def never_fits_now(self, request: Request) -> bool:
        """Whether the tokens that it has, and the next, fit into no pool of the present members."""
        return min(request.num_tokens + 1, request.max_total_tokens) > self.longest_context_tokens()

    def _why_impossible(self, request: Request) -> tuple[str, str] | None:
        """Code and sentence."""
        longest, limit = self.longest_context_tokens(), self._model.max_context_tokens
        if request.max_total_tokens > longest:
            is_the_models = limit is not None and request.max_total_tokens > limit
            return "too_long", (
                f"prompt ({len(request.prompt_token_ids)} tokens) and max_tokens ({request.sampling.max_tokens}) need "
                f"a context of {request.max_total_tokens} tokens; "
                + (f"this model attends to {limit} tokens at most" if is_the_models else f"{_HOLDS} {longest}")
            )
        if any(not 0 <= token < self._model.vocab_size for token in request.prompt_token_ids):
            return "bad_request", (f"a token id of the prompt is outside of the vocabulary of {self._model.vocab_size}")
        if self._scheduler.find(request.request_id) is not None or self._is_arriving(request.request_id):
            return "bad_request", "a request of this id is not finished yet"
        if not request.prompt_token_ids:
            return "bad_request", "the prompt is empty: it needs at least one token"
        return None

    def _why_not_now(self, request: Request) -> tuple[str, str] | None:
        if self.draining:
            return "draining", "this instance is about to leave"
        if self._scheduler.is_full:
            return "queue_full", f"{len(self._scheduler.waiting)} requests wait already; try again later"
        return None
