"""Loans of requests that were handed over: this instance's, until the successor takes them in its own name."""

import time
from collections.abc import Callable

from megatron_distkv.errors import LedgerUnavailable
from megatron_distkv.ledger import DebtLedger
from megatron_distkv.rmanager.held_loan import HeldLoan

# A successor that has not taken a loan over by then never will.
PATIENCE_S = 10.0
LOOK_INTERVAL_S = 0.2


class Bequests:
    """Only the engine's thread calls it. `release` ends a loan that nobody took."""

    def __init__(self, ledger: DebtLedger, release: Callable[[HeldLoan], None]) -> None:
        self._ledger = ledger
        self._release = release
        self._until_s: dict[HeldLoan, float] = {}
        self._look_again_at_s = float("-inf")

    @property
    def is_empty(self) -> bool:
        return not self._until_s

    def add(self, loan: HeldLoan) -> None:
        self._until_s[loan] = time.monotonic() + PATIENCE_S

    def settle(self) -> int:
        """Forget what is the successor's by now, and end what nobody wanted; returns how many rBlocks that was."""
        now_s = time.monotonic()
        if self.is_empty or now_s < self._look_again_at_s:
            return 0
        self._look_again_at_s = now_s + LOOK_INTERVAL_S
        try:
            mine = {loan.loan_id for loan in self._ledger.snapshot().loans}
        except LedgerUnavailable:
            return 0
        overdue = [loan for loan, until_s in self._until_s.items() if loan.loan_id in mine and until_s < now_s]
        for loan in overdue:
            self._release(loan)
        ended = [loan for loan in self._until_s if loan.loan_id not in mine or loan in overdue]
        for loan in ended:
            del self._until_s[loan]
        return sum(loan.num_rblocks for loan in ended)
