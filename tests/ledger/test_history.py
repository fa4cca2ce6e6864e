"""The history says every event that a ledger writes in a sentence, and the secret end of no loan's id."""

import re
from pathlib import Path

import pytest

from megatron_distkv import ledger
from megatron_distkv.ledger import MemoryLedger, render_history
from megatron_distkv.rblock import InstanceId, LoanId

A, B, C = InstanceId("a"), InstanceId("b"), InstanceId("c")
SECRET = "0123456789abcdef"
# note('join', ...), drop_loan(id, 'release'), bury(id, "dead"): each names an event; others pass one on.
WRITES_EVENT = re.compile(r"""\b(?:note\(|(?:drop_loan|drop|bury)\([^()'"]*, ?)(['"])(\w+)\1""")


def events_written() -> set[str]:
    room = Path(ledger.__file__).parent
    sources = [*room.glob("scripts/*.lua"), *room.glob("memory_*.py")]
    return {event for source in sources for _, event in WRITES_EVENT.findall(source.read_text())}


def test_all_events_are_found() -> None:
    assert events_written() >= {"join", "leave", "dead", "replaced", "loan", "release", "transfer", "void", "overdue",
                                "rebuild"}  # fmt: skip


@pytest.mark.parametrize("event", sorted(events_written()))
def test_each_event_is_a_sentence(event: str) -> None:
    facts = {"loan": f"a.1.1.{SECRET}", "debtor": "a", "creditor": "b", "rblocks": "4", "instance": "a",
             "epoch": "1", "new_debtor": "c"}  # fmt: skip
    said = render_history([{"at_ms": "0", "event": event, **facts}])
    assert "event=" not in said
    assert SECRET not in said


def test_an_event_of_a_later_version_does_not_show_a_loan_either() -> None:
    said = render_history(
        [{"at_ms": "0", "event": "eclipse", "loan": f"a.1.1.{SECRET}", "new_loan": f"b.1.1.{SECRET}"}]
    )
    assert "loan=a.1.1" in said
    assert SECRET not in said


def test_a_debt_handed_over_is_two_lines_and_stays_owed() -> None:
    # Given a debt of a to b, which c takes over
    pool = MemoryLedger(clock_ms=lambda: 1_763_700_000_000)
    epochs = {name: pool.register(name, "unix:x", 16, 2, 60.0).epoch for name in (A, B, C)}
    old, new = LoanId(f"a.1.1.{SECRET}"), LoanId(f"c.1.1.{SECRET}")
    assert pool.borrow(old, A, epochs[A], B, epochs[B], 4, 60.0) is None
    assert pool.accept(old, B, epochs[B]) is None
    assert pool.transfer(old, new, C, epochs[C], B, epochs[B]) is None
    # Then the history says so, and what is owed does not change
    lines = [" ".join(line[20:].split()) for line in render_history(pool.events(100)).splitlines()[4:]]
    assert lines == [
        "4 a borrowed 4 rBlocks of b (a.1.1)",
        "0 a handed its debt of 4 rBlocks at b on to c (a.1.1)",
        "4 c borrowed 4 rBlocks of b (c.1.1)",
    ]
