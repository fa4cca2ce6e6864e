"""The event stream for a person: one line per event, with what all instances owed each other after it."""

from collections.abc import Iterable, Mapping
from datetime import datetime

from megatron_distkv.rblock import loan_name

_SENTENCES = {
    "join": "{instance} joined (epoch {epoch})",
    "leave": "{instance} left",
    "dead": "{instance} is dead: its lease had ended",
    "replaced": "{instance} was replaced by a later one of its name",
    "loan": "{debtor} borrowed {rblocks} rBlocks of {creditor}  ({name})",
    "release": "{debtor} gave {rblocks} rBlocks back to {creditor}  ({name})",
    "void": "{debtor} owes {creditor} {rblocks} rBlocks no more: one of them is gone  ({name})",
    "overdue": "{creditor} never answered {debtor}, who asked for {rblocks} rBlocks  ({name})",
    "transfer": "{debtor} handed its debt of {rblocks} rBlocks at {creditor} on to {new_debtor}  ({name})",
    "unreadable": "somebody else has written into the record of {instance}: it registers again",
    "unreadable_loan": "a loan of {instance} could not be read and has ended  ({name})",
    "rebuild": "another server took over: the ledger was rebuilt from the instances",
}


def render_history(events: Iterable[Mapping[str, str]]) -> str:
    """Events oldest first, as `DebtLedger.events` gives them. Debts older than the first event are not in the sums."""
    owed: dict[str, int] = {}
    lines = [f"{'time':<20}{'owed':>6}  event"]
    for event in events:
        _book(owed, event)
        lines.append(f"{_time(event)}{sum(owed.values()):>6}  {_sentence(event)}")
    return "\n".join(lines)


def _book(owed: dict[str, int], event: Mapping[str, str]) -> None:
    kind, loan = event.get("event"), event.get("loan", "")
    if kind == "loan":
        owed[loan] = int(event.get("rblocks", "0"))
    elif kind == "rebuild":
        owed.clear()
    else:
        owed.pop(loan, None)


def _sentence(event: Mapping[str, str]) -> str:
    """Never a whole loan id: who knows it reads and writes the loan's rBlocks."""
    shown = {**event, "name": loan_name(event.get("loan", ""))}
    try:
        return _SENTENCES[event.get("event", "")].format_map(shown)
    except KeyError:  # an event of a later version
        facts = {key: loan_name(value) if "loan" in key else value for key, value in event.items() if key != "at_ms"}
        return "  ".join(f"{key}={value}" for key, value in facts.items())


def _time(event: Mapping[str, str]) -> str:
    at_s = int(event.get("at_ms", "0")) / 1000
    return f"{datetime.fromtimestamp(at_s).strftime('%Y-%m-%d %H:%M:%S'):<20}"
