"""This member's loans as the ledger has them, on either side: what it borrows and what it lends.

A loan's id is a secret of its two sides: who knows it may read and write the rBlocks. The ledger, which every member
reads, gets only a key made of it, from which the id cannot be found.
"""

from collections.abc import Collection

from megatron_distkv.errors import LedgerUnavailable
from megatron_distkv.ledger import CreditorOffer, DebtLedger, Loan, Recall
from megatron_distkv.messages import Refusal
from megatron_distkv.pool.member import Identity
from megatron_distkv.rblock import InstanceId, LoanId, LoanKey, loan_key

# A creditor that has not accepted within this time never will: the ledger drops the reservation.
PENDING_S = 5.0


class LoanBook:
    """Any thread may call it. All but `release` raise LedgerUnavailable; each call is one round trip."""

    def __init__(self, ledger: DebtLedger, identity: Identity) -> None:
        self._ledger = ledger
        self.identity = identity

    # ------------------------------------------------------------------ as debtor

    def reserve(self, loan_id: LoanId, creditor: CreditorOffer, num_rblocks: int) -> Refusal | None:
        me = self.identity
        return self._ledger.borrow(
            loan_key(loan_id), me.instance, me.epoch, creditor.instance, creditor.epoch, num_rblocks, PENDING_S
        )

    def known(self, keys: Collection[LoanKey]) -> set[LoanKey]:
        """Which of these the ledger has now."""
        return self._ledger.known_loans(keys)

    # ------------------------------------------------------------------ as creditor

    def accept(self, loan_id: LoanId) -> Refusal | None:
        try:
            return self._ledger.accept(loan_key(loan_id), self.identity.instance, self.identity.epoch)
        except LedgerUnavailable:
            return Refusal.LEDGER_DOWN

    def transfer(self, loan_id: LoanId, new_loan_id: LoanId, debtor: InstanceId, debtor_epoch: int) -> Refusal | None:
        """The loan has another debtor from now on, under another id."""
        me = self.identity
        try:
            return self._ledger.transfer(
                loan_key(loan_id), loan_key(new_loan_id), debtor, debtor_epoch, me.instance, me.epoch
            )
        except LedgerUnavailable:
            return Refusal.LEDGER_DOWN

    def restore(self, loan_id: LoanId, debtor: InstanceId, debtor_epoch: int, num_rblocks: int) -> Refusal | None:
        me = self.identity
        return self._ledger.restore(loan_key(loan_id), debtor, debtor_epoch, me.instance, me.epoch, num_rblocks)

    def lent(self) -> dict[LoanKey, Loan]:
        """What the ledger says that this member lends."""
        return {loan.key: loan for loan in self._ledger.loans_of(self.identity.instance, self.identity.epoch)}

    def reclaim(self, num_rblocks: int) -> list[Recall]:
        """Ask debtors for as much back; they hear of it with their next heartbeats."""
        return self._ledger.reclaim(self.identity.instance, self.identity.epoch, num_rblocks)

    # ------------------------------------------------------------------ as either

    def release(self, key: LoanKey) -> None:
        self._ledger.release(key, self.identity.instance, self.identity.epoch)
