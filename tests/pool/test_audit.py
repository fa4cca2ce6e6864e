"""Books in order have nothing to say; each way for them to be wrong is one sentence that names who."""

from collections.abc import Callable
from dataclasses import replace

import msgspec
import pytest

from megatron_distkv.ledger import InstanceReport, MemoryLedger, RequestPlacementEntry, render_history
from megatron_distkv.messages import InstanceStatus
from megatron_distkv.pool import Picture, check_instance, check_picture, picture_of
from megatron_distkv.rblock import HOST, InstanceId, LoanId, loan_key
from tests.pool.members import info

A, B = InstanceId("a"), InstanceId("b")


def lent() -> MemoryLedger:
    """a owes b four rBlocks, of which a request of a uses three."""
    ledger = MemoryLedger(clock_ms=lambda: 1_763_700_000_000)
    epochs = {name: ledger.register(name, "unix:x", 16, 2, 60.0, info=info()).epoch for name in (A, B)}
    loan = loan_key(LoanId("a.1.1.0123456789abcdef"))
    assert ledger.borrow(loan, A, epochs[A], B, epochs[B], 4, 60.0) is None
    assert ledger.accept(loan, B, epochs[B]) is None
    ledger.heartbeat(A, epochs[A], InstanceReport(16, placements=(RequestPlacementEntry("r", B, 3, False),)), 60.0)
    return ledger


def test_books_in_order_have_nothing_to_say() -> None:
    assert check_picture(picture_of(lent().snapshot())) == []


def test_host_memory_is_no_debt() -> None:
    # Given an instance with two rBlocks of host memory, and requests that use two, or three
    for count, found in ((2, []), (3, ["a has 3 rBlocks in host memory, of 2"])):
        ledger = MemoryLedger()
        epoch = ledger.register(A, "unix:x", 16, 2, 60.0, info=info(host_rblocks=2)).epoch
        placements = (RequestPlacementEntry("r", HOST, count, False),)
        ledger.heartbeat(A, epoch, InstanceReport(16, placements=placements), 60.0)
        assert check_picture(picture_of(ledger.snapshot())) == found


def with_record(picture: Picture, name: InstanceId, **changes: object) -> Picture:
    member = replace(picture.members[name], **changes)  # type: ignore[arg-type]
    return replace(picture, members={**picture.members, name: member})


def with_loan(picture: Picture, **changes: object) -> Picture:
    return replace(picture, loans=tuple(replace(x, **changes) for x in picture.loans))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda s: with_record(s, B, lent=5), "b lends 4 rBlocks by its loans, 5 by its record"),
        (lambda s: with_record(s, A, borrowed=3), "a borrows 4 rBlocks by its loans, 3 by its record"),
        (lambda s: with_record(s, B, reserved=13), "b lends 4 rBlocks and may lend 3"),
        (lambda s: with_record(s, B, local_used=13), "b uses 13 rBlocks and lends 4, of 16"),
        (lambda s: with_record(s, A, epoch=7), "loan a.1.1 of a from b: a is at epoch 7"),
        (lambda s: with_loan(s, creditor=InstanceId("gone")), "loan a.1.1 of a from gone: gone is not in the pool"),
        (lambda s: with_loan(s, num_rblocks=2), "a has 3 rBlocks at b and borrowed 2"),
        (lambda s: with_loan(s, creditor=A), "loan a.1.1 of a from a is with itself"),
        (lambda s: with_loan(s, num_rblocks=0), "loan a.1.1 of a from b is of 0 rBlocks"),
    ],
)
def test_each_way_to_be_wrong_is_named(spoil: Callable[[Picture], Picture], sentence: str) -> None:
    found = check_picture(spoil(picture_of(lent().snapshot())))
    assert any(said.startswith(sentence) for said in found), found


def test_an_instance_that_says_otherwise_is_named() -> None:
    record = picture_of(lent().snapshot()).find(B)
    assert record is not None
    honest = InstanceStatus(
        query_id=0, instance_id="b", num_running=0, num_waiting=0, free_rblocks=12, used_rblocks=0, lent_rblocks=4,
        borrowed_rblocks=0, num_steps=0, num_preemptions=0, num_computed_tokens=0,
    )  # fmt: skip
    assert check_instance(record, honest) == []
    (lends, leaks) = check_instance(record, replace_status(honest, lent_rblocks=3))
    assert lends == "b lends 3 rBlocks, the ledger says 4"
    assert leaks == "b has 15 rBlocks free, used and lent, of 16"


def replace_status(status: InstanceStatus, **changes: int) -> InstanceStatus:
    return msgspec.structs.replace(status, **changes)


def test_history_is_a_line_per_event_with_the_sum_owed_and_without_the_secret_of_a_loan() -> None:
    ledger = lent()
    (loan,) = ledger.snapshot().loans
    ledger.release(loan.key, A, loan.debtor_epoch)
    ledger.deregister(B, loan.creditor_epoch)
    lines = render_history(ledger.events(100)).splitlines()
    assert [" ".join(line[20:].split()) for line in lines[3:]] == [
        "4 a borrowed 4 rBlocks of b (a.1.1)",
        "0 a gave 4 rBlocks back to b (a.1.1)",
        "0 b left",
    ]
    assert "a joined" in lines[1]
    assert "2025-11-2" in lines[1]
    assert "0123456789abcdef" not in "\n".join(lines)


def test_an_event_of_a_later_version_is_shown_as_it_is() -> None:
    assert "event=eclipse  moon=full" in render_history([{"at_ms": "0", "event": "eclipse", "moon": "full"}])
