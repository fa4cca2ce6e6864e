"""Which of this rank's rBlocks each debtor may use: what a query or a store is checked against."""

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class GrantedLoan:
    debtor: str
    block_ids: frozenset[int]


class LoanTable:
    """Thread-safe: channel threads read, the rManager (or, on a follower, its leader's messages) writes."""

    def __init__(self) -> None:
        self._loans: dict[str, GrantedLoan] = {}
        self._lock = threading.RLock()
        self.version = 0  # changes with every revocation: what was checked under another version is checked again

    def grant(self, loan_id: str, debtor: str, block_ids: Sequence[int]) -> None:
        with self._lock:
            self._loans[loan_id] = GrantedLoan(debtor, frozenset(block_ids))

    def revoke(self, loan_id: str) -> None:
        """Returns only when nobody holds the table: a store that has begun is then complete."""
        with self._lock:
            if self._loans.pop(loan_id, None) is not None:
                self.version += 1

    def covers(self, debtor: str, loan_ids: Iterable[str], block_ids: Iterable[int]) -> bool:
        """Whether these live loans of `debtor` hold all of these rBlocks."""
        with self._lock:
            loans = [self._loans.get(loan_id) for loan_id in loan_ids]
            allowed: set[int] = set()
            for loan in loans:
                if loan is None or loan.debtor != debtor:
                    return False
                allowed |= loan.block_ids
            return allowed.issuperset(block_ids)

    @contextmanager
    def held(self) -> Iterator[None]:
        """No loan ends inside: for writes."""
        with self._lock:
            yield
