"""Plans from snapshots, one leader among many, and the dead buried."""

from typing import Any

from megatron_distkv.gmanager import GManager
from megatron_distkv.gmanager.debt_graph import debt_graph, find_cycle
from megatron_distkv.gmanager.planner import plan
from megatron_distkv.ledger import InstanceReport, Loan, LoanState, MemoryLedger, RequestPlacementEntry
from megatron_distkv.pool import picture_of
from megatron_distkv.rblock import InstanceId, LoanId
from tests.pool.members import info

A, B, C = (InstanceId(name) for name in "abc")


class Pool:
    """Three instances of 100 rBlocks in an in-memory ledger with our own clock."""

    def __init__(self) -> None:
        self.now_ms = 1_000
        self.ledger = MemoryLedger(clock_ms=lambda: self.now_ms)
        self.epochs = {x: self.ledger.register(x, x, 100, 10, 10.0, info=info()).epoch for x in (A, B, C)}

    def report(self, instance: InstanceId, used: int, running: int = 1, waiting: int = 0, **sizes: int) -> Any:
        placed = tuple(RequestPlacementEntry(name, instance, size, True) for name, size in sizes.items())
        report = InstanceReport(used, num_running=running, num_waiting=waiting, placements=placed)
        return self.ledger.heartbeat(instance, self.epochs[instance], report, 10.0)


def test_the_longest_request_of_a_full_instance_moves_to_the_freest() -> None:
    # Given a full a where requests wait, b with some room, c empty
    pool = Pool()
    pool.report(A, 95, running=2, waiting=3, short=15, long=80)
    pool.report(B, 40)
    pool.report(C, 0, running=0)
    # When planned, then half of the longest goes to the freest
    (move,) = plan(picture_of(pool.ledger.snapshot()))
    assert (move.request_id, move.source, move.destination, move.num_rblocks) == ("long", A, C, 40)


def test_a_memory_only_lender_takes_what_is_to_move() -> None:
    pool = Pool()
    pool.ledger.register(InstanceId("lender"), "lender", 400, 0, 10.0, info=info(role="lender"))
    pool.report(A, 95, running=2, waiting=3, long=80)
    (move,) = plan(picture_of(pool.ledger.snapshot()))
    assert (move.source, move.destination) == (A, "lender")


def test_nothing_moves_without_need_or_without_room() -> None:
    pool = Pool()
    pool.report(A, 95, waiting=0, long=95)
    assert plan(picture_of(pool.ledger.snapshot())) == []
    pool.report(A, 95, waiting=2, long=95)
    pool.report(B, 89)
    pool.report(C, 0, waiting=1)
    assert plan(picture_of(pool.ledger.snapshot())) == []


def test_one_leader_publishes_and_the_debtor_hears_of_it_once() -> None:
    pool = Pool()
    pool.report(A, 95, waiting=1, long=90)
    first, second = (GManager(pool.ledger, name, interval_s=1.0) for name in ("g1", "g2"))
    assert first.plan_once() == 1
    assert second.plan_once() == 0
    assert len(pool.report(A, 95, waiting=1, long=90).moves) == 1
    assert pool.report(A, 95, waiting=1, long=90).moves == ()
    # When the leader is silent for its lease, the other takes over
    pool.now_ms += 5_001
    assert second.plan_once() == 1
    assert first.plan_once() == 0


def test_the_dead_are_buried() -> None:
    pool = Pool()
    for _ in range(3):
        pool.now_ms += 5_000  # at most half a lease of the pool's own time passes from one look to the next
        pool.ledger.snapshot()
    assert GManager(pool.ledger, "g", 1.0).plan_once() == 0
    assert pool.ledger.snapshot().instances == ()


def test_a_circle_of_debts_is_found() -> None:
    def loan(number: int, debtor: InstanceId, creditor: InstanceId) -> Loan:
        return Loan(LoanId(str(number)), debtor, 1, creditor, 1, 5, LoanState.ACTIVE)

    chain = [loan(1, A, B), loan(2, B, C), loan(3, A, C)]
    assert find_cycle(debt_graph(chain)) is None
    assert find_cycle(debt_graph([*chain, loan(4, C, A)])) == [A, B, C, A]
    assert debt_graph([loan(1, A, B), loan(2, A, B)]) == {A: {B: 10}}
