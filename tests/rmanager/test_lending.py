"""The creditor's side beside its ledger: a heartbeat may come between any two words of another's question."""

from collections.abc import Callable

import pytest

from megatron_distkv.clock import SystemClock
from megatron_distkv.kvcache.rblock_allocator import RBlockAllocator
from megatron_distkv.ledger import MemoryLedger
from megatron_distkv.messages import Holder, InheritHeader, LendHeader, Refusal
from megatron_distkv.pool import Identity, LoanBook
from megatron_distkv.rblock import InstanceId, LoanId, LoanKey, loan_key
from megatron_distkv.rmanager import Lending, NoFollowers
from tests.pool.at_once import AtOnce
from tests.virtual_time.pool import NoTensors

CREDITOR, DEBTOR, SUCCESSOR = InstanceId("creditor"), InstanceId("debtor"), InstanceId("successor")
LOAN, SUCCESSORS_LOAN = LoanId("debtor.1.1.secret"), LoanId("successor.1.1.secret")


class Interrupted(MemoryLedger):
    """Something else happens before or after a loan gets its new debtor."""

    before: Callable[[], None] = staticmethod(lambda: None)
    after: Callable[[], None] = staticmethod(lambda: None)

    def transfer(
        self, loan_id: LoanKey, new_loan_id: LoanKey, new_debtor: InstanceId, new_debtor_epoch: int,
        creditor: InstanceId, creditor_epoch: int,
    ) -> Refusal | None:  # fmt: skip
        self.before()
        refusal = super().transfer(loan_id, new_loan_id, new_debtor, new_debtor_epoch, creditor, creditor_epoch)
        self.after()
        return refusal


class Lender:
    """One member with 8 rBlocks, of which the debtor has 4."""

    def __init__(self) -> None:
        self.ledger = Interrupted()
        self.epochs = {
            name: self.ledger.register(name, name, 8, 0, 60.0).epoch for name in (CREDITOR, DEBTOR, SUCCESSOR)
        }
        me = Identity(CREDITOR)
        me.epoch = self.epochs[CREDITOR]
        self.allocator = RBlockAllocator(8, 8)
        self.lending = Lending(
            self.allocator, LoanBook(self.ledger, me), NoTensors(), NoFollowers(), lambda: False, AtOnce(),
            SystemClock(seed=1),
        )  # fmt: skip
        debtor_epoch = self.epochs[DEBTOR]
        self.ledger.borrow(loan_key(LOAN), DEBTOR, debtor_epoch, CREDITOR, me.epoch, 4, 5.0)
        self.block_ids = self.lending.lend(LendHeader(LOAN, DEBTOR, debtor_epoch, 4), Holder(DEBTOR)).block_ids

    def beat(self) -> None:
        self.lending.reconcile(4)

    def inherit(self) -> list[int]:
        """What the successor is given."""
        header = InheritHeader(LOAN, SUCCESSORS_LOAN, self.epochs[SUCCESSOR])
        return self.lending.transfer(header, Holder(SUCCESSOR)).block_ids

    @property
    def owed_by(self) -> list[str]:
        """In the ledger, and here."""
        in_ledger = [loan.debtor for loan in self.ledger.loans_of(CREDITOR, self.epochs[CREDITOR])]
        return [*in_ledger, *(lent.debtor for lent in self.lending.lent.values())]


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_heartbeat_in_the_midst_of_an_inheritance_takes_nothing_back(when: str) -> None:
    # Given a loan that goes to another debtor
    lender = Lender()
    # When a heartbeat comes just before or after the ledger has written it down
    setattr(lender.ledger, when, lender.beat)
    # Then the successor has all of it, here and in the ledger, and keeps it
    assert lender.inherit() == lender.block_ids != []
    assert lender.owed_by == [SUCCESSOR, SUCCESSOR]
    lender.beat()
    assert (lender.owed_by, lender.allocator.num_lent) == ([SUCCESSOR, SUCCESSOR], 4)


def test_a_loan_that_its_debtor_returns_in_the_midst_of_an_inheritance_is_nobodys() -> None:
    lender = Lender()
    lender.ledger.after = lambda: (lender.lending.release(LOAN, Holder(DEBTOR)), None)[1]
    assert lender.inherit() == []
    lender.beat()
    assert (lender.owed_by, lender.allocator.num_lent) == ([], 0)


def test_a_loan_that_the_ledger_has_ended_comes_back_with_a_heartbeat() -> None:
    lender = Lender()
    lender.ledger.release(loan_key(LOAN), DEBTOR, lender.epochs[DEBTOR])
    lender.beat()
    assert (lender.owed_by, lender.allocator.num_lent) == ([], 0)
