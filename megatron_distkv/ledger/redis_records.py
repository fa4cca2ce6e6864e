"""What the scripts answer, as records. A reply of another shape raises ValueError, TypeError or LookupError."""

import json
from collections.abc import Mapping, Sequence

from megatron_distkv.ledger.records import (
    InstanceRecord,
    InstanceState,
    Loan,
    LoanState,
    Move,
    RequestPlacementEntry,
)
from megatron_distkv.rblock import InstanceId, LoanId


def pairs(flat: Sequence[str]) -> list[tuple[str, str]]:
    return list(zip(flat[::2], flat[1::2], strict=True))


def read_move(source: InstanceId, text: str) -> Move:
    request_id, destination, num = text.rsplit("|", 2)
    return Move(request_id, source, InstanceId(destination), int(num))


def read_loan(row: Sequence[str]) -> Loan:
    loan, debtor, debtor_epoch, creditor, creditor_epoch, num, state = row
    return Loan(
        LoanId(loan), InstanceId(debtor), int(debtor_epoch), InstanceId(creditor), int(creditor_epoch), int(num),
        LoanState(state),
    )  # fmt: skip


def read_record(name: str, lease_left_ms: float, fields: Mapping[str, str]) -> InstanceRecord:
    info = json.loads(fields["info"])
    if not isinstance(info, dict) or not all(isinstance(value, str) for value in info.values()):
        raise TypeError(f"the facts of {name} are not texts by name")
    counts = {
        key: int(fields[key])
        for key in ("epoch", "total", "reserved", "local_used", "lent", "borrowed", "num_running", "num_waiting",
                    "max_request_tokens")
    }  # fmt: skip
    return InstanceRecord(
        instance=InstanceId(name),
        address=fields["address"],
        state=InstanceState(fields["state"]),
        lease_left_ms=int(lease_left_ms),
        info=info,
        **counts,
    )


def read_placements(flat: Sequence[str]) -> tuple[RequestPlacementEntry, ...]:
    entries = []
    for key, value in sorted(pairs(flat)):
        request_id, _, holder = key.rpartition("|")
        num, _, is_local = value.partition("|")
        entries.append(RequestPlacementEntry(request_id, InstanceId(holder), int(num), is_local == "1"))
    return tuple(sorted(entries, key=lambda entry: (entry.request_id, entry.holder)))
