"""A release that the creditor did not hear reaches it all the same, however late it wakes."""

from megatron_distkv.ledger import open_ledger
from megatron_distkv.ledger.embedded_server import EmbeddedServer
from megatron_distkv.rblock import InstanceId, LoanId
from megatron_distkv.rmanager import Identity, LateReleases

DEBTOR, CREDITOR, LOAN = InstanceId("d"), InstanceId("c"), LoanId("d.1.0")


def test_a_loan_that_its_creditor_restores_after_its_end_is_released_again(server: EmbeddedServer) -> None:
    ledger = open_ledger(server.url, "p")
    debtor, creditor = (ledger.register(name, "unix:x", 16, 0, 600.0) for name in (DEBTOR, CREDITOR))
    identity = Identity(DEBTOR)
    identity.epoch = debtor.epoch
    assert ledger.borrow(LOAN, DEBTOR, debtor.epoch, CREDITOR, creditor.epoch, 4, 60.0) is None
    assert ledger.accept(LOAN, CREDITOR, creditor.epoch) is None
    # Given a ledger that has lost its data while the creditor hangs
    server.kill()
    server.start()
    ledger.register(DEBTOR, "unix:x", 16, 0, 600.0, epoch=debtor.epoch, generation=debtor.generation)
    # When the debtor ends the loan, of which the ledger knows nothing
    late = LateReleases(ledger, identity)
    late.release(LOAN)
    late.tell()
    # And the creditor wakes, and restores what it still lends
    ledger.register(CREDITOR, "unix:x", 16, 0, 600.0, epoch=creditor.epoch, generation=creditor.generation)
    assert ledger.restore(LOAN, DEBTOR, debtor.epoch, CREDITOR, creditor.epoch, 4) is None
    assert ledger.snapshot().loans
    # Then the debtor's next look ends it
    late._look_again_at_s = 0.0
    late.tell()
    assert ledger.snapshot().loans == ()
    ledger.close()
