"""Everything that crosses a process border, as msgspec structs (MessagePack on the wire), a file for each walk.

gateway <-> instance: `requests`. rManager <-> rManager, over a transport channel: one header type per `MessageKind`,
in `loans`, `queries` and `handover`. For gateways, on whatever way: `counts`. `decode` refuses what does not fit its
type: a peer's bytes are checked there.
"""

from megatron_distkv.messages.counts import Counted, Counts, counted_here, happened_here
from megatron_distkv.messages.handover import CommitHeader, InheritedSpan, InheritHeader, PrepareHeader
from megatron_distkv.messages.kinds import Acknowledge, MessageKind, Refusal
from megatron_distkv.messages.loans import (
    FetchHeader,
    GrantHeader,
    Holder,
    LendHeader,
    LendReply,
    ReleaseHeader,
    Revoked,
    RevokeHeader,
    StoreHeader,
    TransferHeader,
)
from megatron_distkv.messages.queries import QueryHeader, QueryShare, Scoring
from megatron_distkv.messages.receipt import RequestKV, continue_receipt, receipt_of
from megatron_distkv.messages.requests import (
    AbortRequest,
    DrainInstance,
    FromInstance,
    HandedOver,
    InstanceStatus,
    NewRequest,
    RequestRefused,
    StatusQuery,
    ToInstance,
    TokenLogprobs,
    TokenOutput,
)
from megatron_distkv.messages.wire import BlockId, Count, Positive, Serial, decode

__all__ = [
    "AbortRequest",
    "Acknowledge",
    "BlockId",
    "CommitHeader",
    "Count",
    "Counted",
    "Counts",
    "DrainInstance",
    "FetchHeader",
    "FromInstance",
    "GrantHeader",
    "HandedOver",
    "Holder",
    "InheritHeader",
    "InheritedSpan",
    "InstanceStatus",
    "LendHeader",
    "LendReply",
    "MessageKind",
    "NewRequest",
    "Positive",
    "PrepareHeader",
    "QueryHeader",
    "QueryShare",
    "Refusal",
    "ReleaseHeader",
    "RequestKV",
    "RequestRefused",
    "RevokeHeader",
    "Revoked",
    "Scoring",
    "Serial",
    "StatusQuery",
    "StoreHeader",
    "ToInstance",
    "TokenLogprobs",
    "TokenOutput",
    "TransferHeader",
    "continue_receipt",
    "counted_here",
    "decode",
    "happened_here",
    "receipt_of",
]
