"""Gateway <-> instance: a request, its tokens, and how the instance fares."""

import msgspec

from megatron_distkv.messages.counts import Counted
from megatron_distkv.messages.receipt import RequestKV
from megatron_distkv.sampling_params import SamplingParams


class NewRequest(msgspec.Struct, frozen=True, tag="new"):
    """`output_token_ids`: what another instance has computed and the client has seen; only what follows is sent.

    `handover_id`: under which that other instance has handed this request's KV over to this one.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    eos_token_ids: list[int] = []
    output_token_ids: list[int] = []
    handover_id: str = ""


class AbortRequest(msgspec.Struct, frozen=True, tag="abort"):
    request_id: str


class StatusQuery(msgspec.Struct, frozen=True, tag="status"):
    """Asks for an `InstanceStatus`; the answer carries the same `query_id`."""

    query_id: int


class DrainInstance(msgspec.Struct, frozen=True, tag="drain"):
    """Take no new request, give lent memory back, and end: when all is done, or after `within_s` all the same."""

    within_s: float


class TokenLogprobs(msgspec.Struct, frozen=True):
    """Natural-log probabilities at one output position, before temperature: the chosen token's and the top ones'."""

    chosen: float
    top: list[tuple[int, float]]  # (token id, log-probability), likeliest first


class TokenOutput(msgspec.Struct, frozen=True, tag="token"):
    """New tokens of one request. `finish_reason` is set in the last one, which also carries `kv`.

    The first has no tokens: the instance begins to compute the request.
    An instance that ends before its requests sends `kv` alone: its part of a request that others go on with.
    """

    request_id: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    kv: RequestKV | None = None


class RequestRefused(msgspec.Struct, frozen=True, tag="refused"):
    """The instance did not take the request: `code` for programs, `message` for people."""

    request_id: str
    code: str  # "queue_full" | "too_long" | "draining" | "bad_request" | "no_progress" | "bad_logits"
    message: str


class HandedOver(msgspec.Struct, frozen=True, tag="handed_over"):
    """The instance leaves and has nothing more to say of this request.

    `successor` has its KV, for who names the `handover_id` within a few seconds; "": nobody has, ask another.
    """

    request_id: str
    successor: str = ""
    handover_id: str = ""


class InstanceStatus(msgspec.Struct, frozen=True, tag="instance_status"):
    query_id: int
    instance_id: str
    num_running: int
    num_waiting: int
    free_rblocks: int
    used_rblocks: int
    lent_rblocks: int
    borrowed_rblocks: int
    num_steps: int
    num_preemptions: int
    num_computed_tokens: int
    used_host_rblocks: int = 0
    counted: list[Counted] = []  # by each of its ranks


ToInstance = NewRequest | AbortRequest | StatusQuery | DrainInstance
FromInstance = TokenOutput | RequestRefused | HandedOver | InstanceStatus
