"""Which of this rank's rBlocks each debtor may use: what a query or a store is checked against.

    a loan's rBlocks = | stored under it: may be read | not yet: may only be written |

Memory is lent as it is, with what its last user left there: nobody reads an rBlock before it was written for him.
"""

import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum

from megatron_distkv.attention.stored_rblocks import StoredRBlocks
from megatron_distkv.messages import Holder


class Access(StrEnum):
    """Whether a debtor may use what it names. The asker hears only yes or no: not even whether a loan exists."""

    GRANTED = "granted"
    ENDED = "ended"  # no such loan (any more)
    FOREIGN = "foreign"  # another's loan, or rBlocks outside of the loan
    UNWRITTEN = "unwritten"  # of the loan, but nothing was stored there under it


@dataclass
class _GrantedLoan:
    holder: Holder
    block_ids: frozenset[int]
    stored: StoredRBlocks = field(default_factory=StoredRBlocks)


class LoanTable:
    """Thread-safe: channel threads read, the rManager (or, on a follower, its leader's messages) writes."""

    def __init__(self) -> None:
        self._loans: dict[str, _GrantedLoan] = {}
        self._lock = threading.RLock()
        self.version = 0  # changes with every revocation: what was checked under another version is checked again

    def grant(self, loan_id: str, holder: Holder, block_ids: Sequence[int]) -> None:
        """Asked again with more rBlocks, the others stay stored."""
        with self._lock:
            had = self._loans.get(loan_id)
            loan = _GrantedLoan(holder, frozenset(block_ids))
            if had is not None and had.holder == holder and had.block_ids <= loan.block_ids:
                loan.stored = had.stored
            elif had is not None:
                self.version += 1
            self._loans[loan_id] = loan

    def transfer(self, loan_id: str, new_loan_id: str, holder: Holder) -> None:
        """The loan is `holder`'s from now on, under another id, with all that was stored; nothing, if it has ended."""
        with self._lock:
            loan = self._loans.pop(loan_id, None)
            if loan is not None:
                self._loans[new_loan_id] = _GrantedLoan(holder, loan.block_ids, loan.stored)
                self.version += 1

    def revoke(self, loan_id: str) -> frozenset[int]:
        """Which rBlocks were stored in full under it.

        Returns only when nobody holds the table: a store that has begun is then complete.
        """
        with self._lock:
            loan = self._loans.pop(loan_id, None)
            if loan is None:
                return frozenset()
            self.version += 1
            return frozenset(loan.stored.whole)

    def may_write(self, asker: Holder, loan_ids: Sequence[str], block_ids: Collection[int]) -> Access:
        with self._lock:
            loans = self._loans_of(asker, loan_ids)
            return loans if isinstance(loans, Access) else _is_inside(loans, block_ids)

    def may_read(self, asker: Holder, loan_ids: Sequence[str], block_ids: Collection[int], heads: slice) -> Access:
        """`heads`: those of this rank's KV heads that are asked about."""
        with self._lock:
            loans = self._loans_of(asker, loan_ids)
            if isinstance(loans, Access):
                return loans
            if len(loans) == 1 and loans[0].stored.holds(block_ids, heads):  # nothing is stored outside of a loan
                return Access.GRANTED
            access = _is_inside(loans, block_ids)
            if access is not Access.GRANTED or _is_stored(loans, block_ids, heads):
                return access
            return Access.UNWRITTEN

    def note_stored(self, loan_id: str, block_ids: Sequence[int], heads: slice, num_heads: int) -> None:
        """These rBlocks of the loan now hold `heads` of this rank's `num_heads` KV heads; call it inside `held`."""
        with self._lock:
            self._loans[loan_id].stored.add(block_ids, heads, num_heads)

    @contextmanager
    def held(self) -> Iterator[None]:
        """No loan ends inside: for writes."""
        with self._lock:
            yield

    def _loans_of(self, asker: Holder, loan_ids: Sequence[str]) -> list[_GrantedLoan] | Access:
        found = [self._loans.get(loan_id) for loan_id in loan_ids]
        loans = [loan for loan in found if loan is not None]
        if not all(loan.holder.is_proven_by(asker) for loan in loans):
            return Access.FOREIGN
        return loans if len(loans) == len(found) else Access.ENDED


def _is_inside(loans: Sequence[_GrantedLoan], block_ids: Collection[int]) -> Access:
    allowed = loans[0].block_ids if len(loans) == 1 else frozenset[int]().union(*(loan.block_ids for loan in loans))
    return Access.GRANTED if allowed.issuperset(block_ids) else Access.FOREIGN


def _is_stored(loans: Sequence[_GrantedLoan], block_ids: Collection[int], heads: slice) -> bool:
    """All of `block_ids` are in one of the loans, each in one only."""
    wanted = set(block_ids)
    return all(loan.stored.holds(wanted & loan.block_ids, heads) for loan in loans)
