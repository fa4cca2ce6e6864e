"""Loans that ended while their creditor could not be told."""

import threading
import time
from contextlib import suppress

from megatron_distkv.errors import LedgerUnavailable
from megatron_distkv.ledger import DebtLedger
from megatron_distkv.log import get_logger
from megatron_distkv.rblock import LoanId, loan_name
from megatron_distkv.rmanager.identity import Identity

logger = get_logger(__name__)
# A creditor that hangs may wake after a long time, and then restore loans in a ledger that had lost its data.
REMEMBERED_S = 600.0
LOOK_INTERVAL_S = 1.0


class LateReleases:
    """The ledger is told now, if it answers, and again whenever such a loan is seen in it: creditors hear it there."""

    def __init__(self, ledger: DebtLedger, identity: Identity) -> None:
        self._ledger = ledger
        self._identity = identity
        self._ended_until_s: dict[LoanId, float] = {}
        self._look_again_at_s = 0.0
        self._lock = threading.Lock()

    def release(self, loan_id: LoanId) -> None:
        with self._lock:
            self._ended_until_s[loan_id] = time.monotonic() + REMEMBERED_S
        with suppress(LedgerUnavailable):
            self._tell(loan_id)

    def tell(self) -> None:
        """With every heartbeat; raises LedgerUnavailable."""
        now_s = time.monotonic()
        with self._lock:
            self._ended_until_s = {x: until_s for x, until_s in self._ended_until_s.items() if until_s > now_s}
            ended = set(self._ended_until_s)
        if not ended or now_s < self._look_again_at_s:
            return
        self._look_again_at_s = now_s + LOOK_INTERVAL_S
        for loan in self._ledger.snapshot().loans:
            if loan.loan_id in ended:
                logger.warning("loan %s is in the ledger again, and has ended: releasing it", loan_name(loan.loan_id))
                self._tell(loan.loan_id)

    def _tell(self, loan_id: LoanId) -> None:
        self._ledger.release(loan_id, self._identity.instance, self._identity.epoch)
