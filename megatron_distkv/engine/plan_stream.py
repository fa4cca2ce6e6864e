"""Steps on their way to followers: of a request's spans only those that the step before had not.

Both sides keep the spans of the last step's requests, and no others; a request that pauses is told whole again.
"""

from typing import TypeAlias

import msgspec

from megatron_distkv.engine.batch import Slice, StepPlan
from megatron_distkv.messages import decode
from megatron_distkv.rblock import LocalSpan, RemoteSpan, Span

# Of a span in the step before, in the same request's list: where it was.
_Place: TypeAlias = int
_Kept: TypeAlias = dict[str, list[Span]]  # by request


class _Told(msgspec.Struct, frozen=True):
    plan: StepPlan  # its slices without spans
    spans: list[list[_Place | LocalSpan | RemoteSpan]]  # of each slice


class PlanSender:
    """The leader's side: `encode` each step once, in order."""

    def __init__(self) -> None:
        self._kept: _Kept = {}

    def encode(self, plan: StepPlan) -> bytes:
        spans = [_changes(self._kept.get(piece.request_id, []), piece.spans) for piece in plan.slices]
        self._kept = _spans_by_request(plan)
        bare = [msgspec.structs.replace(piece, spans=[]) for piece in plan.slices]
        return msgspec.msgpack.encode(_Told(msgspec.structs.replace(plan, slices=bare), spans))


class PlanReceiver:
    """A follower's side: `decode` what the leader encoded, in its order."""

    def __init__(self) -> None:
        self._kept: _Kept = {}

    def decode(self, data: bytes) -> StepPlan:
        """Raises DistkvError for what no leader sends."""
        told = decode(data, _Told)
        slices = [self._whole(piece, spans) for piece, spans in zip(told.plan.slices, told.spans, strict=True)]
        plan = msgspec.structs.replace(told.plan, slices=slices)
        self._kept = _spans_by_request(plan)
        return plan

    def _whole(self, piece: Slice, told: list[_Place | LocalSpan | RemoteSpan]) -> Slice:
        before = self._kept.get(piece.request_id, [])
        return msgspec.structs.replace(piece, spans=[before[x] if isinstance(x, int) else x for x in told])


def _changes(before: list[Span], now: list[Span]) -> list[_Place | LocalSpan | RemoteSpan]:
    places = {_identity(span): place for place, span in enumerate(before)}
    return [places.get(_identity(span), span) for span in now]


def _identity(span: Span) -> tuple[int | str, ...]:
    """Of the very same ids: to compare them one by one would cost as much as to send them."""
    holder = () if isinstance(span, LocalSpan) else (span.creditor, span.loan_id)
    return (span.first, id(span.block_ids), *holder)


def _spans_by_request(plan: StepPlan) -> _Kept:
    return {piece.request_id: piece.spans for piece in plan.slices}
