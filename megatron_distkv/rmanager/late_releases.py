"""Loans that ended while neither their creditor nor the ledger could be told."""

import threading
import time

from megatron_distkv.errors import LedgerUnavailable
from megatron_distkv.ledger import DebtLedger
from megatron_distkv.log import get_logger
from megatron_distkv.rblock import LoanId, loan_name
from megatron_distkv.rmanager.identity import Identity

logger = get_logger(__name__)


class LateReleases:
    """The heartbeat says again that they have ended, until the ledger has heard it.

    A ledger that has lost its data does not know a loan before its creditor restores it: so one that it does not know
    is told again for `patience_s`.
    """

    def __init__(self, ledger: DebtLedger, identity: Identity, patience_s: float) -> None:
        self._ledger = ledger
        self._identity = identity
        self._patience_s = patience_s
        self._until_s: dict[LoanId, float] = {}
        self._lock = threading.Lock()

    def release(self, loan_id: LoanId) -> None:
        """Tell the ledger now, or later."""
        try:
            self._tell(loan_id)
        except LedgerUnavailable:
            logger.warning(
                "loan %s has ended; ledger and creditor are away, and will hear of it later", loan_name(loan_id)
            )
            with self._lock:
                self._until_s[loan_id] = float("inf")

    def tell(self) -> None:
        """Raises LedgerUnavailable."""
        with self._lock:
            waiting = list(self._until_s.items())
        for loan_id, until_s in waiting:
            is_told = self._tell(loan_id) > 0 or time.monotonic() > until_s
            with self._lock:
                if is_told:
                    del self._until_s[loan_id]
                else:
                    self._until_s[loan_id] = min(until_s, time.monotonic() + self._patience_s)

    def _tell(self, loan_id: LoanId) -> int:
        return self._ledger.release(loan_id, self._identity.instance, self._identity.epoch)
