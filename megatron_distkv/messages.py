"""Everything that crosses a process border, as msgspec structs (MessagePack on the wire).

gateway <-> instance: `ToInstance` and `FromInstance`.
rManager <-> rManager, over a transport channel: the header types below, one per `MessageKind`.
A decoder refuses what does not fit its type, so that bytes of a peer are checked in one place.
"""

from enum import IntEnum, StrEnum
from typing import Annotated, TypeVar

import msgspec

from megatron_distkv.errors import UnreadableMessage
from megatron_distkv.sampling_params import SamplingParams

_T = TypeVar("_T")


def decode(data: bytes, kind: type[_T]) -> _T:
    """Bytes of a peer as a `kind`; raises UnreadableMessage, whatever they are."""
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except (msgspec.MsgspecError, RecursionError) as error:  # RecursionError: arrays in arrays in arrays
        raise UnreadableMessage(f"a {kind.__name__} cannot be read: {error}") from None


# --------------------------------------------------------------------------------- gateway <-> instance


class NewRequest(msgspec.Struct, frozen=True, tag="new"):
    """`output_token_ids`: what another instance has computed and the client has seen; only what follows is sent.

    `adoption_id`: under which that other instance has handed this request's KV over to this one.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    eos_token_ids: list[int] = []
    output_token_ids: list[int] = []
    adoption_id: str = ""


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


class RequestKV(msgspec.Struct, frozen=True):
    """A request's receipt: where its rBlocks lay in one instance, and what that cost.

    rBlock-seconds are the sum over time of the rBlocks that held its KV. `remote_attention_s` is its part of the time
    that steps waited for creditors' answers after their own work was done: a step's wait is divided among the requests
    that asked, in proportion to tokens times borrowed rBlocks. (With tensor parallelism: as the leader waited.)
    """

    max_local_rblocks: int = 0
    max_host_rblocks: int = 0  # in the instance's own host memory
    max_borrowed_rblocks: dict[str, int] = {}  # by creditor
    num_preemptions: int = 0
    num_recomputed_tokens: int = 0
    num_tokens_at_losses: int = 0  # what starting over at each loss would have computed again
    local_rblock_s: float = 0.0
    host_rblock_s: float = 0.0
    borrowed_rblock_s: dict[str, float] = {}  # by lender
    remote_attention_s: float = 0.0


class TokenOutput(msgspec.Struct, frozen=True, tag="token"):
    """New tokens of one request. `finish_reason` is set in the last one, which also carries `kv`.

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
    code: str  # "queue_full" | "too_long" | "draining" | "bad_request"
    message: str


class HandedOver(msgspec.Struct, frozen=True, tag="handed_over"):
    """The instance leaves and has nothing more to say of this request.

    `successor` has its KV, for who names the `adoption_id` within a few seconds; "": nobody has, ask another.
    """

    request_id: str
    successor: str = ""
    adoption_id: str = ""


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


ToInstance = NewRequest | AbortRequest | StatusQuery | DrainInstance
FromInstance = TokenOutput | RequestRefused | HandedOver | InstanceStatus

# --------------------------------------------------------------------------------- instance <-> instance


class MessageKind(IntEnum):
    """First field of every channel message; says which header follows."""

    LEND = 1  # debtor's leader -> creditor's leader: try_move_kvcache, reserve rBlocks
    RELEASE = 2  # debtor's leader -> creditor's leader: a loan ends
    STORE = 3  # debtor's rank r -> creditor's rank r: KV bytes of migrated rBlocks
    QUERY = 4  # debtor's rank r -> creditor's rank r: MicroAttention over borrowed rBlocks
    GRANT = 5  # creditor's leader -> its own followers: a loan's rBlocks
    REVOKE = 6  # creditor's leader -> its own followers: a loan has ended
    STEP = 7  # an instance's leader -> its own followers: run one engine step
    FETCH = 9  # debtor's rank r -> creditor's rank r: KV bytes of borrowed rBlocks, back home
    PROBE = 13  # any member -> another's leader: how long is the way? Any payload; the answer is empty
    STOP = 8  # an instance's leader -> its own followers: exit
    PREPARE = 10  # a leaving instance's leader -> its successor's: room for a request
    ADOPT = 11  # a leaving instance's leader -> its successor's: the request, whose rBlocks are stored
    INHERIT = 12  # the successor's leader -> a creditor's leader: a loan of the one that leaves, in its own name


class Refusal(StrEnum):
    """Why a loan was not granted. The words go into logs, metrics and the ledger's replies."""

    FULL = "full"  # the creditor has too few free rBlocks
    CAP = "cap"  # the creditor already lends as much as its cap allows
    IN_DEBT = "in_debt"  # the creditor borrows itself: no chains
    SELF = "self"  # debtor and creditor are the same instance
    STALE_DEBTOR = "stale_debtor"  # the debtor's epoch or lease has ended
    STALE_CREDITOR = "stale_creditor"  # the creditor's epoch or lease has ended
    CONFLICT = "conflict"  # the loan id is in use with other terms
    DRAINING = "draining"  # the creditor is about to leave
    UNKNOWN_LOAN = "unknown_loan"  # no such loan, or it has ended
    LEDGER_DOWN = "ledger_down"  # the ledger cannot be asked: no new loans


BlockId = Annotated[int, msgspec.Meta(ge=0, le=(1 << 31) - 1)]
Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 31) - 1)]
Positive = Annotated[float, msgspec.Meta(gt=0)]
Serial = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]  # epochs, steps


class LendHeader(msgspec.Struct, frozen=True):
    loan_id: str
    debtor: str
    debtor_epoch: Serial
    num_rblocks: Count


class LendReply(msgspec.Struct, frozen=True):
    """Physical ids of the granted rBlocks in the creditor's pool (the same on all its ranks), or a refusal."""

    block_ids: list[BlockId] = []
    refusal: Refusal | None = None


class ReleaseHeader(msgspec.Struct, frozen=True):
    loan_id: str
    debtor: str


class PrepareHeader(msgspec.Struct, frozen=True):
    """Room for `num_rblocks` in all. Asked again, more are added. Answer: `LendReply`, all of them in order."""

    adoption_id: str
    num_rblocks: Count


class InheritedSpan(msgspec.Struct, frozen=True):
    """rBlocks `first ..` of the request at `creditor`, lent to the one that leaves as `loan_id`."""

    first: Count
    block_ids: list[BlockId]
    creditor: str
    address: str
    loan_id: str


class AdoptHeader(msgspec.Struct, frozen=True):
    """A request in mid-flight, less its tokens: those come from the gateway, which knows them. Answer: `Acknowledge`.

    `here`: rBlock of the request -> physical id at the successor. `lost`: positions `[start, stop)` without their KV.
    """

    adoption_id: str
    num_prompt_tokens: Count
    num_output_tokens: Count
    num_computed_tokens: Count
    lost: list[tuple[Count, Count]]
    sampling_seed: int
    age_s: float
    kv: RequestKV
    here: dict[Count, BlockId]
    elsewhere: list[InheritedSpan]


class InheritHeader(msgspec.Struct, frozen=True):
    """Who knows a loan's id may take it over. Answer: `LendReply`, all its rBlocks in order."""

    loan_id: str
    new_loan_id: str
    heir_epoch: Serial


class StoreHeader(msgspec.Struct, frozen=True):
    """Payload: the rBlocks' bytes, `[num_rblocks, layers, kv_heads, 2, rblock_size, head_dim]`, in the pool's dtype."""

    loan_id: str
    block_ids: list[BlockId]


class FetchHeader(msgspec.Struct, frozen=True):
    """Reply payload: as that of a `StoreHeader`."""

    loan_id: str
    block_ids: list[int]


class Scoring(msgspec.Struct, frozen=True, omit_defaults=True):
    """How a layer makes its scores, where it is not the ordinary way (contract: ops.micro_attention)."""

    scale: Positive | None = None  # None: 1 / sqrt(head_dim)
    window: Annotated[int, msgspec.Meta(ge=1, le=(1 << 31) - 1)] | None = None
    soft_cap: Positive | None = None


class QueryShare(msgspec.Struct, frozen=True, omit_defaults=True):
    """One sequence of a query: `num_queries` query rows against these rBlocks, which are full and in the past of all.

    For a window also the position of each rBlock's first token, and of the first query; the others follow it.
    """

    loan_ids: list[str]
    block_ids: list[BlockId]
    num_queries: Count
    block_starts: list[Count] = []
    first_position: Count = 0


# Questions that a step may ask of one creditor for one layer, in fixed order.
MOST_PARTS = 1 << 14


class QueryHeader(msgspec.Struct, frozen=True):
    """MicroAttention of one layer. `shares` come with the step's first layer that makes scores in this way, and hold
    for its other layers that do: with a window only what some query sees is asked for.

    Payload: q `[T, query_heads, head_dim]` in the model's dtype, T = sum of num_queries. Reply payload: the normalised
    output `[T, query_heads, head_dim]` in the wire dtype, then LSE `[T, query_heads]` fp32 (natural log; empty = -inf).

    In fixed order (`num_partials` > 0; attention/fixed_order.py) the answer has, for each share, its rows for each node
    that covers its rBlocks, `num_partials` rows in all, in fp32; a step may ask several `part`s for a layer, and shares
    have all positions.
    """

    step: Serial
    layer: Count
    shares: list[QueryShare] | None = None
    scoring: Scoring = Scoring()
    part: Annotated[int, msgspec.Meta(ge=0, lt=MOST_PARTS)] = 0
    num_partials: Count = 0


class Acknowledge(msgspec.Struct, frozen=True):
    """Answer to STORE, FETCH, QUERY, RELEASE, ADOPT, GRANT and REVOKE: refusal None means done.

    `held_back_s`: for so long the query waited because the creditor has work of its own.
    """

    refusal: Refusal | None = None
    held_back_s: float = 0.0


class GrantHeader(msgspec.Struct, frozen=True):
    loan_id: str
    debtor: str
    block_ids: list[BlockId]


class RevokeHeader(msgspec.Struct, frozen=True):
    loan_id: str
