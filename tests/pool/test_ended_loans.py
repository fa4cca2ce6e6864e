"""A release that the creditor did not hear reaches it all the same, however late it wakes."""

from megatron_distkv.clock import SystemClock
from megatron_distkv.ledger.embedded_server import EmbeddedServer
from megatron_distkv.ledger.opening import open_ledger
from megatron_distkv.pool import EndedLoans, Identity, LoanBook
from megatron_distkv.rblock import InstanceId, LoanId, loan_key

DEBTOR, CREDITOR, LOAN = InstanceId("d"), InstanceId("c"), LoanId("d.1.0.secret")


class LateClock(SystemClock):
    """Runs on when it is told."""

    passed_s = 0.0

    def monotonic_s(self) -> float:
        return self.passed_s


def test_a_loan_that_its_creditor_restores_after_its_end_is_released_again(server: EmbeddedServer) -> None:
    ledger, clock, key = open_ledger(server.url, "p"), LateClock(), loan_key(LOAN)
    debtor, creditor = (ledger.register(name, "unix:x", 16, 0, 600.0) for name in (DEBTOR, CREDITOR))
    assert ledger.borrow(key, DEBTOR, debtor.epoch, CREDITOR, creditor.epoch, 4, 60.0) is None
    assert ledger.accept(key, CREDITOR, creditor.epoch) is None
    # Given a ledger that has lost its data while the creditor hangs
    server.kill()
    server.start()
    ledger.register(DEBTOR, "unix:x", 16, 0, 600.0, epoch=debtor.epoch, generation=debtor.generation)
    # When the debtor ends the loan, of which the ledger knows nothing
    ended = EndedLoans(LoanBook(ledger, Identity(DEBTOR, debtor.epoch)), clock)
    ended.add(LOAN)
    ended.tell()
    # And the creditor wakes, and restores what it still lends
    ledger.register(CREDITOR, "unix:x", 16, 0, 600.0, epoch=creditor.epoch, generation=creditor.generation)
    assert ledger.restore(key, DEBTOR, debtor.epoch, CREDITOR, creditor.epoch, 4) is None
    assert ledger.snapshot().loans
    # Then the debtor's next look ends it
    clock.passed_s = 5.0
    ended.tell()
    assert ledger.snapshot().loans == ()
    ledger.close()
