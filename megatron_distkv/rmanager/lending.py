"""The creditor's side: rBlocks of this instance's pool that others use. Called by channel threads and the heartbeat.

The ledger holds the promise, the allocator the truth: a loan is real once `allocator.lend` has given it rBlocks.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_distkv import metrics
from megatron_distkv.attention import LoanTable
from megatron_distkv.errors import LedgerUnavailable
from megatron_distkv.kvcache.rblock_allocator import RBlockAllocator
from megatron_distkv.ledger import DebtLedger, LoanState
from megatron_distkv.log import get_logger
from megatron_distkv.messages import InheritHeader, LendHeader, LendReply, Refusal
from megatron_distkv.rblock import InstanceId, LoanId, loan_name
from megatron_distkv.rmanager.identity import Identity

logger = get_logger(__name__)


class Followers(Protocol):
    """The other tensor-parallel ranks of this instance: each keeps its heads of every lent rBlock."""

    def grant(self, loan_id: str, debtor: str, block_ids: Sequence[int]) -> None: ...
    def revoke(self, loan_id: str) -> None: ...


class NoFollowers:
    """One rank only."""

    def grant(self, loan_id: str, debtor: str, block_ids: Sequence[int]) -> None:
        pass

    def revoke(self, loan_id: str) -> None:
        pass


@dataclass(frozen=True)
class Lent:
    debtor: InstanceId
    debtor_epoch: int
    num_rblocks: int


class Lending:
    """Accepts, ends and restores loans. `in_debt` tells whether this instance borrows itself: then it lends nothing."""

    def __init__(
        self,
        allocator: RBlockAllocator,
        ledger: DebtLedger,
        identity: Identity,
        loan_table: LoanTable,
        followers: Followers,
        in_debt: Callable[[], bool],
    ) -> None:
        self._allocator = allocator
        self._ledger = ledger
        self._identity = identity
        self._loan_table = loan_table
        self._followers = followers
        self._in_debt = in_debt
        self._lent: dict[LoanId, Lent] = {}
        self._lock = threading.RLock()
        self._restore_until_s: dict[LoanId, float] = {}
        self.draining = False

    def lend(self, header: LendHeader) -> LendReply:
        """Answer to a debtor that has reserved in the ledger: the rBlocks, or why not. Idempotent by loan id."""
        loan_id = LoanId(header.loan_id)
        with self._lock:
            refusal = self._why_not(header)
            if refusal is not None:
                return LendReply(refusal=refusal)
            block_ids = self._allocator.lend(loan_id, header.num_rblocks)
            if block_ids is None:
                return LendReply(refusal=self._why_no_memory(header.num_rblocks))
            self._grant(loan_id, header, block_ids)
            refusal = self._accept_in_ledger(loan_id)
            if refusal is not None:
                self._end(loan_id)
                return LendReply(refusal=refusal)
        return LendReply(block_ids=list(block_ids))

    def release(self, loan_id: LoanId, debtor: str) -> Refusal | None:
        """The debtor gives a loan back. An unknown loan is fine: it ended before."""
        with self._lock:
            lent = self._lent.get(loan_id)
            if lent is None:
                return None
            if lent.debtor != debtor:
                return Refusal.UNKNOWN_LOAN
            self._end(loan_id)
        self._release_in_ledger(loan_id)
        return None

    def transfer(self, header: InheritHeader, heir: InstanceId) -> LendReply:
        """Another debtor takes a loan over, with all that lies in it."""
        loan_id, new_loan_id = LoanId(header.loan_id), LoanId(header.new_loan_id)
        with self._lock:
            lent = self._lent.get(loan_id)
            if lent is None or new_loan_id in self._lent:
                return LendReply(refusal=Refusal.UNKNOWN_LOAN)
            refusal = self._transfer_in_ledger(loan_id, new_loan_id, heir, header.heir_epoch)
            if refusal is not None:
                return LendReply(refusal=refusal)
            self._revoke(loan_id)
            block_ids = self._allocator.rename_loan(loan_id, new_loan_id)
            terms = LendHeader(new_loan_id, heir, header.heir_epoch, lent.num_rblocks)
            self._grant(new_loan_id, terms, block_ids)
        return LendReply(block_ids=list(block_ids))

    def keep(self, loan_id: LoanId) -> tuple[int, ...]:
        """A debtor's request goes on here: this instance uses what it borrowed itself. Empty: the loan has ended."""
        with self._lock:
            if loan_id not in self._lent:
                return ()
            self._revoke(loan_id)
            block_ids = self._allocator.keep_lent(loan_id)
        self._release_in_ledger(loan_id)
        return block_ids

    def reconcile(self) -> None:
        """Make this table and the ledger's equal again; raises LedgerUnavailable.

        Our own list is read first: whatever is in it was reserved in the ledger before, so a loan that the ledger no
        longer names has ended there (its debtor died, or could not reach us).
        """
        self._restore_pending()
        with self._lock:
            mine = self._lent.keys() - self._restore_until_s.keys()
        in_ledger = {
            loan.loan_id: loan for loan in self._ledger.loans_of(self._identity.instance, self._identity.epoch)
        }
        for loan_id in mine - in_ledger.keys():
            logger.info("loan %s has ended in the ledger: taking its rBlocks back", loan_name(loan_id))
            with self._lock:
                self._end(loan_id)
        for loan_id, loan in in_ledger.items():
            with self._lock:
                is_orphan = loan.state is LoanState.ACTIVE and loan_id not in self._lent
            if is_orphan:
                self._release_in_ledger(loan_id)

    def begin_restore(self, patience_s: float) -> None:
        """The ledger has forgotten this instance: from now on `reconcile` says again what it lends.

        A debtor may register later than we do, so one that the ledger does not know yet gets `patience_s`.
        """
        with self._lock:
            self._restore_until_s = dict.fromkeys(self._lent, time.monotonic() + patience_s)

    def _restore_pending(self) -> None:
        me = self._identity
        for loan_id, until_s in list(self._restore_until_s.items()):
            with self._lock:
                lent = self._lent.get(loan_id)
            refusal = lent and self._ledger.restore(
                loan_id, lent.debtor, lent.debtor_epoch, me.instance, me.epoch, lent.num_rblocks
            )
            if refusal is Refusal.STALE_DEBTOR and time.monotonic() < until_s:
                continue
            del self._restore_until_s[loan_id]
            if refusal:
                logger.warning(
                    "loan %s cannot be restored (%s): taking its rBlocks back", loan_name(loan_id), refusal.value
                )
                with self._lock:
                    self._end(loan_id)

    def _why_not(self, header: LendHeader) -> Refusal | None:
        if self.draining:
            return Refusal.DRAINING
        if header.debtor == self._identity.instance:
            return Refusal.SELF
        if self._in_debt():
            return Refusal.IN_DEBT
        known = self._lent.get(LoanId(header.loan_id))
        terms = Lent(InstanceId(header.debtor), header.debtor_epoch, header.num_rblocks)
        return Refusal.CONFLICT if known is not None and known != terms else None

    def _why_no_memory(self, count: int) -> Refusal:
        return Refusal.CAP if self._allocator.can_allocate(count) else Refusal.FULL

    def _grant(self, loan_id: LoanId, header: LendHeader, block_ids: Sequence[int]) -> None:
        if loan_id not in self._lent:  # a debtor may ask twice
            metrics.LOANS_MADE.inc()
        self._lent[loan_id] = Lent(InstanceId(header.debtor), header.debtor_epoch, header.num_rblocks)
        self._followers.grant(loan_id, header.debtor, block_ids)
        self._loan_table.grant(loan_id, header.debtor, block_ids)

    def _accept_in_ledger(self, loan_id: LoanId) -> Refusal | None:
        try:
            return self._ledger.accept(loan_id, self._identity.instance, self._identity.epoch)
        except LedgerUnavailable:
            return Refusal.LEDGER_DOWN

    def _end(self, loan_id: LoanId) -> None:
        """Revoke on every rank first, then free: no late write of a debtor can reach a reused rBlock."""
        if loan_id in self._lent:
            self._revoke(loan_id)
            self._allocator.end_loan(loan_id)

    def _revoke(self, loan_id: LoanId) -> None:
        del self._lent[loan_id]
        metrics.LOANS_ENDED.inc()
        self._loan_table.revoke(loan_id)
        self._followers.revoke(loan_id)

    def _transfer_in_ledger(
        self, loan_id: LoanId, new_loan_id: LoanId, heir: InstanceId, heir_epoch: int
    ) -> Refusal | None:
        me = self._identity
        try:
            return self._ledger.transfer(loan_id, new_loan_id, heir, heir_epoch, me.instance, me.epoch)
        except LedgerUnavailable:
            return Refusal.LEDGER_DOWN

    def _release_in_ledger(self, loan_id: LoanId) -> None:
        try:
            self._ledger.release(loan_id, self._identity.instance, self._identity.epoch)
        except LedgerUnavailable:
            logger.warning("loan %s ended here; the ledger will hear of it later", loan_name(loan_id))
