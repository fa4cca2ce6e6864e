"""Loans between a pool's members in this process's memory (contract: DebtLedger)."""

from dataclasses import replace

from megatron_distkv.errors import LedgerUnavailable
from megatron_distkv.ledger.memory_state import LockedState
from megatron_distkv.ledger.records import Creditor, Loan, LoanState, Recall
from megatron_distkv.messages import Refusal
from megatron_distkv.rblock import InstanceId, LoanId


class MemoryLoans(LockedState):
    def recommend(self, debtor: InstanceId, num_rblocks: int, limit: int) -> list[Creditor]:
        with self._lock:
            records = [entry.record for entry in self._state.entries.values() if self._state.may_lend(entry.record)]
            records.sort(key=lambda record: (record.free_to_lend, record.instance), reverse=True)
            found: list[Creditor] = []
            covered = 0
            for record in records:
                if len(found) >= limit or covered >= num_rblocks:
                    break
                if record.instance != debtor and self._state.is_live(record.instance, record.epoch):
                    found.append(Creditor(record.instance, record.epoch, record.address, record.free_to_lend))
                    covered += record.free_to_lend
            return found

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
        with self._lock:
            loan = Loan(loan_id, debtor, debtor_epoch, creditor, creditor_epoch, num_rblocks, LoanState.PENDING)
            known = self._state.loans.get(loan_id)
            if known is not None:
                return None if replace(known, state=LoanState.PENDING) == loan else Refusal.CONFLICT
            refusal = self._state.why_not(loan)
            if refusal is None:
                self._state.add(loan)
                self._state.pending_until_ms[loan_id] = self._clock_ms() + int(pending_s * 1000)
            return refusal

    def accept(self, loan_id: LoanId, creditor: InstanceId, creditor_epoch: int) -> Refusal | None:
        with self._lock:
            loan = self._state.loans.get(loan_id)
            if loan is None:
                return Refusal.UNKNOWN_LOAN
            if (loan.creditor, loan.creditor_epoch) != (creditor, creditor_epoch):
                return Refusal.STALE_CREDITOR
            if not self._state.is_live(creditor, creditor_epoch):
                return Refusal.STALE_CREDITOR
            self._state.loans[loan_id] = replace(loan, state=LoanState.ACTIVE)
            self._state.pending_until_ms.pop(loan_id, None)
            return None

    def release(self, loan_id: LoanId, instance: InstanceId, epoch: int) -> int:
        with self._lock:
            loan = self._state.loans.get(loan_id)
            if loan is None:
                return 0
            sides = ((loan.debtor, loan.debtor_epoch), (loan.creditor, loan.creditor_epoch))
            return self._state.drop(loan_id, "release") if (instance, epoch) in sides else 0

    def reclaim(self, creditor: InstanceId, epoch: int, num_rblocks: int) -> list[Recall]:
        with self._lock:
            if not self._state.is_live(creditor, epoch):
                return []
            mine = sorted(self.loans_of(creditor, epoch), key=lambda loan: (-loan.num_rblocks, loan.loan_id))
            recalls: list[Recall] = []
            for loan in mine:
                if num_rblocks <= 0:
                    break
                self._state.recalled.add(loan.loan_id)
                recalls.append(Recall(loan.loan_id, loan.debtor, loan.num_rblocks))
                num_rblocks -= loan.num_rblocks
            return recalls

    def restore(
        self,
        loan_id: LoanId,
        debtor: InstanceId,
        debtor_epoch: int,
        creditor: InstanceId,
        creditor_epoch: int,
        num_rblocks: int,
    ) -> Refusal | None:
        with self._lock:
            loan = Loan(loan_id, debtor, debtor_epoch, creditor, creditor_epoch, num_rblocks, LoanState.ACTIVE)
            known = self._state.loans.get(loan_id)
            if known is not None:
                return None if replace(known, state=LoanState.ACTIVE) == loan else Refusal.CONFLICT
            refusal = self._state.why_not_fenced(loan)
            if refusal is None:
                record = self._state.entries[creditor].record
                refusal = Refusal.CAP if record.lendable_at_most < record.lent + num_rblocks else None
            if refusal is None:
                self._state.add(loan)
            return refusal

    def transfer(
        self,
        loan_id: LoanId,
        new_loan_id: LoanId,
        heir: InstanceId,
        heir_epoch: int,
        creditor: InstanceId,
        creditor_epoch: int,
    ) -> Refusal | None:
        with self._lock:
            state = self._state
            mine = (creditor, creditor_epoch)
            known = state.loans.get(new_loan_id)
            if known is not None:
                is_same = (known.debtor, known.debtor_epoch, known.creditor, known.creditor_epoch) == (
                    heir, heir_epoch, *mine,
                )  # fmt: skip
                return None if is_same else Refusal.CONFLICT
            old = state.loans.get(loan_id)
            if old is None:
                return Refusal.UNKNOWN_LOAN
            if (old.creditor, old.creditor_epoch) != mine:
                return Refusal.STALE_CREDITOR
            new = replace(old, loan_id=new_loan_id, debtor=heir, debtor_epoch=heir_epoch, state=LoanState.ACTIVE)
            refusal = state.why_not_transfer(new)
            if refusal is None:
                state.drop(loan_id, "transfer")
                state.add(new)
            return refusal

    def loans_of(self, creditor: InstanceId, epoch: int) -> list[Loan]:
        with self._lock:
            if not self._state.is_live(creditor, epoch):
                raise LedgerUnavailable(f"the ledger does not know {creditor} (epoch {epoch}) now")
            return sorted((x for x in self._state.loans.values() if x.creditor == creditor), key=lambda x: x.loan_id)
