"""Offline use in one process: prompts in, tokens out. No gateway, no socket."""

from collections.abc import Sequence

from megatron_distkv.clock import Clock
from megatron_distkv.config.instance import InstanceConfig
from megatron_distkv.engine.instance import Instance
from megatron_distkv.engine.rank import build_rank
from megatron_distkv.errors import UserError
from megatron_distkv.ledger.opening import open_ledger
from megatron_distkv.messages import RequestRefused, TokenLogprobs, TokenOutput
from megatron_distkv.model import init_tensor_parallel
from megatron_distkv.request import Request
from megatron_distkv.sampling_params import SamplingParams

# Members that have joined within this time may not be known yet.
DOUBT_S = 1.0


class Completion:
    """Output tokens of one prompt, with the reason for its end and, where asked for, log-probabilities.

    `finish_reason` "error": no further token could be computed; `error` says why in one sentence.
    """

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.finish_reason = ""
        self.error = ""

    def add(self, output: TokenOutput) -> None:
        self.token_ids.extend(output.token_ids)
        self.logprobs.extend(output.logprobs or [])
        self.finish_reason = output.finish_reason or ""

    def fail(self, why: str) -> None:
        self.finish_reason, self.error = "error", why


class LLM:
    """`with LLM(config) as llm: llm.generate([[1, 2, 3]], SamplingParams())`."""

    def __init__(self, config: InstanceConfig, clock: Clock | None = None) -> None:
        """Raises UserError."""
        parallel = init_tensor_parallel(config.tensor_parallel)
        if parallel.size > 1:
            raise UserError("the offline LLM runs on one rank; serve tensor-parallel models with `distkv serve`")
        rank = build_rank(config, parallel, clock)
        ledger = open_ledger(config.ledger.url, config.ledger.pool, clock=rank.clock)
        self.instance = Instance(rank, ledger)

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams | Sequence[SamplingParams]
    ) -> list[Completion]:
        """Completions in the prompts' order; raises UserError for a prompt that can never fit."""
        each = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else sampling
        eos = frozenset(self.instance.model.eos_token_ids)
        pairs = enumerate(zip(prompts, each, strict=True))
        requests = [Request(f"offline-{i}", list(prompt), params, eos) for i, (prompt, params) in pairs]
        for request in requests:
            refused = self._refused(request)
            if refused is not None and refused.code != "queue_full":
                raise UserError(refused.message)
        for request in requests:
            self.instance.add(request)
        completions = {request.request_id: Completion() for request in requests}
        while not self.instance.scheduler.is_idle:
            for output in self.instance.step():
                completions[output.request_id].add(output)
            for failed in self.instance.take_failed():
                completions[failed.request_id].fail(failed.message)
        self.instance.check_integrity()
        self.instance.note_idle()
        return list(completions.values())

    def _refused(self, request: Request) -> RequestRefused | None:
        """What is too long for the pool as it was with the last heartbeat may fit into the one that is there now."""
        clock = self.instance.parts.clock
        until_s = clock.monotonic_s() + DOUBT_S
        while (refused := self.instance.refuse(request)) is not None and refused.code == "too_long":
            if clock.monotonic_s() > until_s or self.instance.is_alone:
                break
            clock.sleep(0.05)
        return refused

    def close(self) -> None:
        self.instance.close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
