"""Loans between a pool's members in Redis (contract: DebtLedger)."""

from megatron_distkv.errors import LedgerUnavailable
from megatron_distkv.ledger.records import Creditor, Loan, Recall
from megatron_distkv.ledger.redis_records import read_loan
from megatron_distkv.ledger.redis_scripts import RedisScripts, reading, to_ms
from megatron_distkv.messages import Refusal
from megatron_distkv.rblock import InstanceId, LoanId


class RedisLoans(RedisScripts):
    @reading
    def recommend(self, debtor: InstanceId, num_rblocks: int, limit: int) -> list[Creditor]:
        rows = self._run("recommend", debtor, num_rblocks, limit)
        return [Creditor(InstanceId(name), int(epoch), address, int(free)) for name, epoch, address, free in rows]

    @reading
    def borrow(
        self,
        loan_id: LoanId,
        debtor: InstanceId,
        debtor_epoch: int,
        creditor: InstanceId,
        creditor_epoch: int,
        num_rblocks: int,
        pending_s: float,
    ) -> Refusal | None:
        return _refusal(
            self._run(
                "borrow", loan_id, debtor, debtor_epoch, creditor, creditor_epoch, num_rblocks, to_ms(pending_s)
            )
        )  # fmt: skip

    @reading
    def accept(self, loan_id: LoanId, creditor: InstanceId, creditor_epoch: int) -> Refusal | None:
        return _refusal(self._run("accept", loan_id, creditor, creditor_epoch))

    @reading
    def release(self, loan_id: LoanId, instance: InstanceId, epoch: int) -> int:
        return int(self._run("release", loan_id, instance, epoch))

    @reading
    def reclaim(self, creditor: InstanceId, epoch: int, num_rblocks: int) -> list[Recall]:
        rows = self._run("reclaim", creditor, epoch, num_rblocks)
        return [Recall(LoanId(loan), InstanceId(debtor), int(num)) for loan, debtor, num in rows]

    @reading
    def restore(
        self,
        loan_id: LoanId,
        debtor: InstanceId,
        debtor_epoch: int,
        creditor: InstanceId,
        creditor_epoch: int,
        num_rblocks: int,
    ) -> Refusal | None:
        return _refusal(
            self._run("restore", loan_id, debtor, debtor_epoch, creditor, creditor_epoch, num_rblocks)
        )  # fmt: skip

    @reading
    def transfer(
        self,
        loan_id: LoanId,
        new_loan_id: LoanId,
        heir: InstanceId,
        heir_epoch: int,
        creditor: InstanceId,
        creditor_epoch: int,
    ) -> Refusal | None:
        return _refusal(
            self._run("transfer", loan_id, new_loan_id, heir, heir_epoch, creditor, creditor_epoch)
        )  # fmt: skip

    @reading
    def loans_of(self, creditor: InstanceId, epoch: int) -> list[Loan]:
        rows = self._run("loans_of", creditor, epoch)
        if rows is None:
            raise LedgerUnavailable(f"the ledger does not know {creditor} (epoch {epoch}) now")
        return [read_loan(row) for row in rows]


def _refusal(name: str) -> Refusal | None:
    return Refusal(name) if name else None
