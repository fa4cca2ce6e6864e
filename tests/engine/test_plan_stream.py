"""Followers get every step as the leader planned it, and of long contexts only what has changed."""

import random

from megatron_distkv.engine.batch import Slice, StepPlan
from megatron_distkv.engine.plan_stream import PlanReceiver, PlanSender
from megatron_distkv.kvcache.block_table import MAX_SPAN_RBLOCKS, BlockTable
from megatron_distkv.rblock import InstanceId, LoanId


def plan(step: int, tables: dict[str, BlockTable]) -> StepPlan:
    """One token of each."""
    slices = []
    for name, table in tables.items():
        end = table.num_rblocks
        slices.append(Slice(name, end - 1, end, table.before(end), True))
    return StepPlan(step, list(range(len(slices))), slices, [], [], [], [])


def table_of(num_rblocks: int) -> BlockTable:
    table = BlockTable()
    table.add_local(range(num_rblocks), range(num_rblocks))
    return table


def test_only_what_has_changed_is_sent() -> None:
    # Given a context of a million tokens, in rBlocks of 16
    table, sender, receiver = table_of(1 << 16), PlanSender(), PlanReceiver()
    whole = sender.encode(plan(0, {"long": table}))
    receiver.decode(whole)
    # When nothing changes, then next to nothing is sent
    nothing = sender.encode(plan(1, {"long": table}))
    assert receiver.decode(nothing) == plan(1, {"long": table})
    assert len(nothing) < 1000 < len(whole) // 100
    # When its oldest rBlock moves out and one is added, then the two spans concerned are
    table.move_to_creditor(0, [7], InstanceId("b"), LoanId("a.1.0"))
    table.add_local([1 << 16], [0])
    changed = sender.encode(plan(2, {"long": table}))
    assert receiver.decode(changed) == plan(2, {"long": table})
    assert len(changed) < 4 * MAX_SPAN_RBLOCKS


def test_a_request_that_pauses_is_told_whole_again() -> None:
    one, other = table_of(3), table_of(2)
    sender, receiver = PlanSender(), PlanReceiver()
    for step, tables in enumerate(({"one": one, "other": other}, {"other": other}, {"one": one, "other": other})):
        planned = plan(step, tables)
        assert receiver.decode(sender.encode(planned)) == planned


def test_another_loan_of_the_same_ids_is_another_span() -> None:
    table, sender, receiver = table_of(4), PlanSender(), PlanReceiver()
    table.move_to_creditor(0, [5, 6], InstanceId("b"), LoanId("a.1.0"))
    for step in range(2):
        assert receiver.decode(sender.encode(plan(step, {"r": table}))) == plan(step, {"r": table})
        table.rename_loan(LoanId("a.1.0"), LoanId("a.1.1"))


def test_whatever_becomes_of_requests() -> None:
    rng = random.Random(5)
    sender, receiver = PlanSender(), PlanReceiver()
    tables: dict[str, BlockTable] = {}
    for step in range(400):
        name = f"r{rng.randrange(6)}"
        table = tables.setdefault(name, table_of(rng.randrange(1, 9)))
        what = rng.choice(["grow", "move", "lose", "end", "nothing"])
        if what == "grow":
            added = table.missing(range(table.num_rblocks + rng.randrange(1, 4)))
            table.add_local(added, [rng.randrange(99) for _ in added])
        elif what == "move" and (spans := table.oldest_local(2, [range(1 << 20)])):
            creditor, loan = rng.choice("bc"), LoanId(f"a.1.{rng.randrange(3)}")
            ids = [rng.randrange(99) for _ in spans[0].block_ids]
            table.move_to_creditor(spans[0].first, ids, InstanceId(creditor), loan)
        elif what == "lose":
            table.remove_loans([LoanId("a.1.1")])
        elif what == "end":
            del tables[name]
        planned = plan(step, {x: tables[x] for x in tables if tables[x].num_rblocks and rng.random() < 0.8})
        assert receiver.decode(sender.encode(planned)) == planned
