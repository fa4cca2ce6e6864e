"""Which of this rank's rBlocks each debtor may use: what a query or a store is checked against."""

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum


class Access(StrEnum):
    """Whether a debtor may use what it names. The asker hears only yes or no: not even whether a loan exists."""

    GRANTED = "granted"
    ENDED = "ended"  # no such loan (any more)
    FOREIGN = "foreign"  # another's loan, or rBlocks outside of the loan


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
        return self.access(debtor, loan_ids, block_ids) is Access.GRANTED

    def access(self, debtor: str, loan_ids: Iterable[str], block_ids: Iterable[int]) -> Access:
        with self._lock:
            loans = [self._loans.get(loan_id) for loan_id in loan_ids]
            if any(loan is not None and loan.debtor != debtor for loan in loans):
                return Access.FOREIGN
            if None in loans:
                return Access.ENDED
            allowed = set().union(*(loan.block_ids for loan in loans if loan is not None))
            return Access.GRANTED if allowed.issuperset(block_ids) else Access.FOREIGN

    @contextmanager
    def held(self) -> Iterator[None]:
        """No loan ends inside: for writes."""
        with self._lock:
            yield
