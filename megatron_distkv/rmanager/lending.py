"""The creditor's side: rBlocks of this instance's pool that others use. Called by channel threads and the heartbeat.

The ledger holds the promise, the allocator the truth: a loan is real once `allocator.lend` has given it rBlocks.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from megatron_distkv import metrics
from megatron_distkv.clock import Clock
from megatron_distkv.errors import LedgerUnavailable
from megatron_distkv.kvcache.rblock_allocator import RBlockAllocator
from megatron_distkv.log import get_logger
from megatron_distkv.messages import Holder, InheritHeader, LendHeader, LendReply, Refusal
from megatron_distkv.pool import LoanBook
from megatron_distkv.rblock import InstanceId, LoanId, loan_key, loan_name

logger = get_logger(__name__)
# Debtors need a heartbeat to hear of a recall: asking more often only repeats it.
ASK_BACK_INTERVAL_S = 1.0


class Grants(Protocol):
    """Which rBlocks of this rank each debtor may use (attention.LoanTable)."""

    def grant(self, loan_id: str, holder: Holder, block_ids: Sequence[int]) -> None: ...
    def transfer(self, loan_id: str, new_loan_id: str, holder: Holder) -> None: ...
    def revoke(self, loan_id: str) -> frozenset[int]:
        """Which rBlocks were stored in full under it."""
        ...


class Followers(Protocol):
    """The other tensor-parallel ranks of this instance: each keeps its heads of every lent rBlock."""

    def grant(self, loan_id: str, holder: Holder, block_ids: Sequence[int]) -> None: ...
    def transfer(self, loan_id: str, new_loan_id: str, holder: Holder) -> None: ...
    def revoke(self, loan_id: str) -> Sequence[frozenset[int]]:
        """For each of them, which rBlocks were stored there under it."""
        ...


class NoFollowers:
    """One rank only."""

    def grant(self, loan_id: str, holder: Holder, block_ids: Sequence[int]) -> None:
        pass

    def transfer(self, loan_id: str, new_loan_id: str, holder: Holder) -> None:
        pass

    def revoke(self, loan_id: str) -> Sequence[frozenset[int]]:
        return ()


@dataclass(frozen=True)
class Lent:
    holder: Holder
    debtor_epoch: int
    num_rblocks: int

    @property
    def debtor(self) -> InstanceId:
        return InstanceId(self.holder.name)


class Lending:
    """Accepts, ends and restores loans. `in_debt` tells whether this instance borrows itself: then it lends nothing.

    The lock is held for looking and writing down, never while anybody else is asked: neither the ledger nor the other
    ranks. A loan that is being ended keeps its rBlocks, and its id, until all ranks have revoked it.
    """

    def __init__(
        self,
        allocator: RBlockAllocator,
        book: LoanBook,
        grants: Grants,
        followers: Followers,
        in_debt: Callable[[], bool],
        jobs: Executor,
        clock: Clock,
    ) -> None:
        self._allocator = allocator
        self._book = book
        self._grants = grants
        self._followers = followers
        self._in_debt = in_debt
        self._jobs = jobs
        self._clock = clock
        self._lent: dict[LoanId, Lent] = {}
        self._ending: set[LoanId] = set()
        self._renamed: dict[LoanId, LoanId] = {}  # by the new id: transfers that the ledger may know of
        self._restore_until_s: dict[LoanId, float] = {}
        self._lock = threading.Lock()
        self._asking_back: Future[None] | None = None
        self._ask_back_again_at_s = float("-inf")
        self.draining = False

    @property
    def lent(self) -> dict[LoanId, Lent]:
        """What others have of this instance now."""
        with self._lock:
            return dict(self._lent)

    # ------------------------------------------------------------------ what debtors ask, on channel threads

    def lend(self, header: LendHeader, debtor: Holder) -> LendReply:
        """Answer to a debtor that has reserved in the ledger: the rBlocks, or why not. Idempotent by loan id."""
        loan_id = LoanId(header.loan_id)
        terms = Lent(debtor, header.debtor_epoch, header.num_rblocks)
        with self._lock:
            refusal = self._why_not(loan_id, terms)
            if refusal is not None:
                return LendReply(refusal=refusal)
            block_ids = self._allocator.lend(loan_id, header.num_rblocks)
            if block_ids is None:
                return LendReply(refusal=self._why_no_memory(header.num_rblocks))
            if loan_id not in self._lent:  # a debtor may ask twice
                metrics.LOANS_MADE.inc()
            self._lent[loan_id] = terms
        self._grant(loan_id, debtor, block_ids)
        refusal = self._book.accept(loan_id)
        if refusal is not None:
            self._end(loan_id)
            return LendReply(refusal=refusal)
        return LendReply(block_ids=list(block_ids))

    def release(self, loan_id: LoanId, debtor: Holder) -> Refusal | None:
        """The debtor gives a loan back. An unknown loan is fine: it ended before."""
        with self._lock:
            lent = self._lent.get(loan_id)
        if lent is None:
            return None
        if not lent.holder.is_proven_by(debtor):
            return Refusal.UNKNOWN_LOAN
        self._end(loan_id)
        self._release_in_ledger(loan_id)
        return None

    def transfer(self, header: InheritHeader, new_debtor: Holder) -> LendReply:
        """Another debtor takes a loan over, with all that lies in it. That it knows the id proves that it may."""
        loan_id, new_loan_id = LoanId(header.loan_id), LoanId(header.new_loan_id)
        with self._lock:
            lent = self._lent.get(loan_id)
            is_taken = new_loan_id in self._lent or new_loan_id in self._ending or new_loan_id in self._renamed
            if lent is None or is_taken:
                return LendReply(refusal=Refusal.UNKNOWN_LOAN)
            self._renamed[new_loan_id] = loan_id
        refusal = self._book.transfer(loan_id, new_loan_id, InstanceId(new_debtor.name), header.debtor_epoch)
        with self._lock:
            del self._renamed[new_loan_id]
            if refusal is not None:
                return LendReply(refusal=refusal)
            if self._lent.pop(loan_id, None) is None:  # it ended meanwhile, and its rBlocks with it
                return LendReply(refusal=Refusal.UNKNOWN_LOAN)
            self._ending.add(loan_id)
            self._lent[new_loan_id] = Lent(new_debtor, header.debtor_epoch, lent.num_rblocks)
        block_ids = self._allocator.rename_loan(loan_id, new_loan_id)
        self._grants.transfer(loan_id, new_loan_id, new_debtor)
        self._followers.transfer(loan_id, new_loan_id, new_debtor)
        self._ending.discard(loan_id)
        return LendReply(block_ids=list(block_ids))

    # ------------------------------------------------------------------ what this instance does with them

    def begin_keep(self, loan_id: LoanId) -> "Future[frozenset[int] | None]":
        """A debtor's request goes on here: this instance will use what it borrowed itself. A job; then call `keep`.

        Its answer: the rBlocks that hold what the debtor has stored, on all ranks. None: the loan has ended.
        """
        return self._jobs.submit(self._revoke_to_keep, loan_id)

    def keep(self, loan_id: LoanId) -> tuple[int, ...]:
        """The rBlocks of a loan that `begin_keep` has found; own requests use them from now on. Never waits."""
        block_ids = self._allocator.keep_lent(loan_id)
        self._ending.discard(loan_id)
        self._jobs.submit(self._release_in_ledger, loan_id)
        return block_ids

    def _revoke_to_keep(self, loan_id: LoanId) -> frozenset[int] | None:
        return self._revoke(loan_id) if self._begin_end(loan_id) else None

    def ask_back(self, num_rblocks: int) -> None:
        """Recall so many rBlocks of debtors, through the ledger; never waits."""
        now_s, is_asking = self._clock.monotonic_s(), self._asking_back is not None and not self._asking_back.done()
        if num_rblocks > 0 and not is_asking and now_s >= self._ask_back_again_at_s:
            self._ask_back_again_at_s = now_s + ASK_BACK_INTERVAL_S
            self._asking_back = self._jobs.submit(self._reclaim, num_rblocks)

    def _reclaim(self, num_rblocks: int) -> None:
        with suppress(LedgerUnavailable):
            self._book.reclaim(num_rblocks)

    # ------------------------------------------------------------------ beside the ledger, with every heartbeat

    def reconcile(self, num_lent_in_ledger: int) -> None:
        """Make this table and the ledger's equal again; raises LedgerUnavailable.

        `num_lent_in_ledger`: rBlocks, by the heartbeat's answer. Where neither lends anything, nothing is asked.
        Our own list is read first: whatever is in it was reserved in the ledger before, so a loan that the ledger no
        longer names has ended there (its debtor died, or could not reach us). One that is on its way to another debtor
        may stand there under either of its ids: it is left alone until it has arrived.
        """
        if not num_lent_in_ledger and not self._lent and not self._restore_until_s:
            return
        self._restore_pending()
        with self._lock:
            mine = {loan_key(loan_id): loan_id for loan_id in self._lent.keys() - self._restore_until_s.keys()}
        in_ledger = self._book.lent()
        with self._lock:
            known = {loan_key(loan_id) for loan_id in (*self._lent, *self._renamed)}
            on_their_way = {loan_key(loan_id) for loan_id in self._renamed.values()}
        for key in mine.keys() - in_ledger.keys() - on_their_way:
            if key in known:  # and has not ended here meanwhile
                logger.info("loan %s has ended in the ledger: taking its rBlocks back", loan_name(key))
                self._end(mine[key])
        for key, loan in in_ledger.items():
            if loan.is_active and key not in known:
                self._book.release(key)

    def begin_restore(self, patience_s: float) -> None:
        """The ledger has forgotten this instance: from now on `reconcile` says again what it lends.

        A debtor may register later than we do, so one that the ledger does not know yet gets `patience_s`.
        """
        with self._lock:
            self._restore_until_s = dict.fromkeys(self._lent, self._clock.monotonic_s() + patience_s)

    def _restore_pending(self) -> None:
        for loan_id, until_s in list(self._restore_until_s.items()):
            with self._lock:
                lent = self._lent.get(loan_id)
            refusal = lent and self._book.restore(loan_id, lent.debtor, lent.debtor_epoch, lent.num_rblocks)
            if refusal is Refusal.STALE_DEBTOR and self._clock.monotonic_s() < until_s:
                continue
            del self._restore_until_s[loan_id]
            if refusal:
                name = loan_name(loan_id)
                logger.warning("loan %s cannot be restored (%s): taking its rBlocks back", name, refusal.value)
                self._end(loan_id)

    # ------------------------------------------------------------------ inside

    def _why_not(self, loan_id: LoanId, terms: Lent) -> Refusal | None:
        if self.draining:
            return Refusal.DRAINING
        if terms.debtor == self._book.identity.instance:
            return Refusal.SELF
        if self._in_debt():
            return Refusal.IN_DEBT
        is_known_otherwise = loan_id in self._ending or self._lent.get(loan_id, terms) != terms
        return Refusal.CONFLICT if is_known_otherwise else None

    def _why_no_memory(self, count: int) -> Refusal:
        return Refusal.CAP if self._allocator.can_allocate(count) else Refusal.FULL

    def _grant(self, loan_id: LoanId, debtor: Holder, block_ids: Sequence[int]) -> None:
        self._followers.grant(loan_id, debtor, block_ids)
        self._grants.grant(loan_id, debtor, block_ids)

    def _begin_end(self, loan_id: LoanId) -> bool:
        """False: it has ended before, or another thread is about to end it."""
        with self._lock:
            if self._lent.pop(loan_id, None) is None:
                return False
            self._ending.add(loan_id)
        metrics.LOANS_ENDED.inc()
        return True

    def _end(self, loan_id: LoanId) -> None:
        """Revoke on every rank first, then free: no late write of a debtor can reach a reused rBlock."""
        if self._begin_end(loan_id):
            self._revoke(loan_id)
            self._allocator.end_loan(loan_id)
            self._ending.discard(loan_id)

    def _revoke(self, loan_id: LoanId) -> frozenset[int]:
        """What was stored under it on all ranks."""
        return self._grants.revoke(loan_id).intersection(*self._followers.revoke(loan_id))

    def _release_in_ledger(self, loan_id: LoanId) -> None:
        try:
            self._book.release(loan_key(loan_id))
        except LedgerUnavailable:
            logger.warning("loan %s ended here; the ledger will hear of it later", loan_name(loan_id))
