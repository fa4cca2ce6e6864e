"""Loans that ended while their creditor could not be told."""

import threading
from contextlib import suppress

from megatron_distkv.clock import Clock
from megatron_distkv.errors import LedgerUnavailable
from megatron_distkv.log import get_logger
from megatron_distkv.pool.loan_book import LoanBook
from megatron_distkv.rblock import LoanId, LoanKey, loan_key, loan_name

logger = get_logger(__name__)
# A creditor that hangs may wake after a long time, and then restore loans in a ledger that had lost its data.
REMEMBERED_S = 600.0
LOOK_INTERVAL_S = 1.0


class EndedLoans:
    """The ledger is told now, if it answers, and again whenever such a loan is seen in it: creditors hear it there."""

    def __init__(self, book: LoanBook, clock: Clock) -> None:
        self._book = book
        self._clock = clock
        self._until_s: dict[LoanKey, float] = {}
        self._look_again_at_s = float("-inf")
        self._lock = threading.Lock()

    def add(self, loan_id: LoanId) -> None:
        """One round trip to the ledger: not for the engine's thread."""
        key = loan_key(loan_id)
        with self._lock:
            self._until_s[key] = self._clock.monotonic_s() + REMEMBERED_S
        with suppress(LedgerUnavailable):
            self._book.release(key)

    def tell(self) -> None:
        """With every heartbeat; raises LedgerUnavailable."""
        now_s = self._clock.monotonic_s()
        with self._lock:
            self._until_s = {key: until_s for key, until_s in self._until_s.items() if until_s > now_s}
            ended = list(self._until_s)
        if not ended or now_s < self._look_again_at_s:
            return
        self._look_again_at_s = now_s + LOOK_INTERVAL_S
        for key in self._book.known(ended):
            logger.warning("loan %s is in the ledger again, and has ended: releasing it", loan_name(key))
            self._book.release(key)
