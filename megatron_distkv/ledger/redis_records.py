"""Records as texts, as the Redis ledger's scripts take and answer them. What is read may be anybody's writing."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from megatron_distkv.ledger.pool_snapshot import MemberChange
from megatron_distkv.ledger.records import (
    CreditorOffer,
    InstanceRecord,
    InstanceState,
    Loan,
    LoanState,
    MoveOrder,
    RequestPlacementEntry,
    in_order,
)
from megatron_distkv.messages import Counted, Refusal
from megatron_distkv.rblock import InstanceId, LoanKey

# What a text of another shape than ours raises when it is read.
UNREADABLE = (
    ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError, msgspec.MsgspecError,
)  # fmt: skip
_T = TypeVar("_T")


def read_pairs(flat: Sequence[str]) -> list[tuple[str, str]]:
    return list(zip(flat[::2], flat[1::2], strict=True))


def read_refusal(name: str) -> Refusal | None:
    return Refusal(name) if name else None


def info_text(info: Mapping[str, str] | None) -> str:
    return json.dumps(dict(info or {}), sort_keys=True)


def _read_info(text: str) -> dict[str, str]:
    return msgspec.json.decode(text, type=dict[str, str])


def placements_text(placements: Sequence[RequestPlacementEntry] | None) -> str:
    """Empty: as they were."""
    if placements is None:
        return ""
    rows = [(entry.request_id, entry.holder, entry.num_rblocks, entry.is_local) for entry in in_order(placements)]
    return msgspec.json.encode(rows).decode()


def counted_text(counted: Sequence[Counted] | None) -> str:
    """Empty: as it was."""
    return "" if counted is None else msgspec.json.encode(counted).decode()


def _read_counted(text: str | None) -> tuple[Counted, ...]:
    """None: the version that has registered this member knows nothing of it."""
    return () if text is None else msgspec.json.decode(text, type=tuple[Counted, ...])


def _read_placements(text: str) -> tuple[RequestPlacementEntry, ...]:
    rows = msgspec.json.decode(text, type=list[tuple[str, str, int, bool]])
    return tuple(RequestPlacementEntry(request, InstanceId(holder), num, local) for request, holder, num, local in rows)


def read_moves(source: InstanceId, texts: Sequence[str]) -> Iterator[MoveOrder]:
    """A plan is advice: one that cannot be read is left out."""
    for text in texts:
        request_id, *rest = text.rsplit("|", 2)
        if len(rest) == 2 and rest[1].isdecimal():
            yield MoveOrder(request_id, source, InstanceId(rest[0]), int(rest[1]))


def read_creditor(row: Sequence[str]) -> CreditorOffer:
    name, epoch, address, free, info = row
    try:
        facts = _read_info(info)
    except UNREADABLE:
        facts = {}
    return CreditorOffer(InstanceId(name), int(epoch), address, int(free), facts)


def read_loan(row: Sequence[str]) -> Loan:
    loan, debtor, debtor_epoch, creditor, creditor_epoch, num, state = row
    return Loan(
        LoanKey(loan), InstanceId(debtor), int(debtor_epoch), InstanceId(creditor), int(creditor_epoch), int(num),
        LoanState(state),
    )  # fmt: skip


def read_member(row: Sequence[Any], now_ms: int) -> MemberChange:
    """What cannot be read of it is left out, and named."""
    instance, *parts = row
    if not parts:
        return MemberChange(InstanceId(instance))
    unreadable: list[str] = []

    def read(what: str, reader: Callable[..., _T], *arguments: object) -> _T | None:
        try:
            return reader(*arguments)
        except UNREADABLE as error:
            unreadable.append(f"{what}: {error}")
            return None

    lease_end_ms, (*fields, counts), loan_rows, placements, is_sealed = parts
    counted = read("its counts", _read_counted, counts) or ()
    record = read("its record", _read_record, instance, lease_end_ms, now_ms, fields, bool(is_sealed), counted)
    loans = [read("a loan", read_loan, row) for row in loan_rows]
    placed = () if placements == "" else read("its placements", _read_placements, placements)
    return MemberChange(
        InstanceId(instance), record, tuple(loan for loan in loans if loan), placed or (), "; ".join(unreadable)
    )  # fmt: skip


_COUNTS = (
    "total", "reserved", "local_used", "lent", "borrowed", "num_running", "num_waiting", "max_request_tokens",
    "prefill_tokens_left",
)  # fmt: skip
# What members of an earlier version do not tell.
_NOT_TOLD = {"prefill_tokens_left": "0"}


def _read_record(
    instance: str, lease_end_ms: str | None, now_ms: int, values: Sequence[str | None], is_sealed: bool,
    counted: tuple[Counted, ...],
) -> InstanceRecord:  # fmt: skip
    """`values` as changes.lua names them, all but the last."""
    names = ("epoch", "address", *_COUNTS[:5], "state", *_COUNTS[5:], "info")
    told = {name: value for name, value in zip(names, values, strict=True) if value is not None}
    fields = {**_NOT_TOLD, **told}
    missing = [name for name in names if name not in fields]
    if missing:
        raise ValueError(f"it has no {', '.join(missing)}")
    if lease_end_ms is None:
        raise ValueError("it has no lease")
    if not is_sealed:
        raise ValueError("another version, or somebody else, has written it")
    return InstanceRecord(
        instance=InstanceId(instance),
        epoch=int(fields["epoch"]),
        address=fields["address"],
        state=InstanceState(fields["state"]),
        lease_left_ms=int(float(lease_end_ms)) - now_ms,
        info=_read_info(fields["info"]),
        counted=counted,
        **{name: int(fields[name]) for name in _COUNTS},
    )
