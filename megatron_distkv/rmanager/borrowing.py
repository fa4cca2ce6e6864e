"""The debtor's side: loans that this instance has taken, one request each.

A loan begins in the ledger (reserve: atomic, fenced, idempotent by loan id) and becomes real when the creditor's
rManager allocates. It ends with its request.
"""

from collections import deque
from collections.abc import Callable, Container, Iterator, Sequence

import msgspec

from megatron_distkv.errors import DistkvError, LedgerUnavailable
from megatron_distkv.ledger import Creditor, DebtLedger
from megatron_distkv.log import get_logger
from megatron_distkv.messages import (
    Acknowledge,
    InheritHeader,
    LendHeader,
    LendReply,
    MessageKind,
    Refusal,
    ReleaseHeader,
    decode,
)
from megatron_distkv.rblock import InstanceId, LoanId, new_loan_id
from megatron_distkv.rmanager.bequests import Bequests
from megatron_distkv.rmanager.held_loan import HeldLoan
from megatron_distkv.rmanager.identity import Identity
from megatron_distkv.rmanager.late_releases import LateReleases
from megatron_distkv.rmanager.peers import Peers
from megatron_distkv.rmanager.pool_outlook import PoolOutlook

logger = get_logger(__name__)
# A creditor that has not accepted within this time never will: the ledger drops the reservation.
PENDING_S = 5.0
# How many creditors one attempt may ask, freest first.
MAX_CREDITORS_ASKED = 8


class Borrowing:
    """Takes, hands out and ends loans. Only the engine's thread changes it."""

    def __init__(
        self,
        ledger: DebtLedger,
        identity: Identity,
        peers: Peers,
        outlook: PoolOutlook,
        late_releases: LateReleases,
        deadline_s: float,
    ) -> None:
        self._ledger = ledger
        self._identity = identity
        self._peers = peers
        self._outlook = outlook
        self._late_releases = late_releases
        self._deadline_s = deadline_s
        self._loans: dict[str, list[HeldLoan]] = {}
        self._bequests = Bequests(ledger, self._release)
        self._num_asked = 0
        self.num_borrowed = 0  # rBlocks of all loans; other threads read it

    def loans(self) -> Iterator[HeldLoan]:
        return (loan for loans in self._loans.values() for loan in loans)

    def loans_of(self, request_id: str) -> list[HeldLoan]:
        return self._loans.get(request_id, [])

    def usable_loans_of(self, request_id: str) -> list[HeldLoan]:
        return [loan for loan in self.loans_of(request_id) if loan.unused and not loan.is_recalled]

    def num_unused(self, request_id: str) -> int:
        return sum(len(loan.unused) for loan in self.usable_loans_of(request_id))

    def borrow(self, request_id: str, count: int, only_from: str | None = None) -> int:
        """Try to borrow `count` rBlocks for a request, over several creditors if need be; returns how many came.

        Asks for more names than `count` needs: the freest creditor may refuse, or be lost while its lease still runs.
        """
        missing = count
        for creditor in self._outlook.creditors()[:MAX_CREDITORS_ASKED]:
            if missing <= 0:
                break
            if only_from in (None, creditor.instance):
                missing -= self._borrow_from(creditor, request_id, min(missing, creditor.free_rblocks))
        return count - missing

    def release_all(self, request_id: str) -> None:
        self.drop_loans(lambda loan: loan.request_id == request_id)

    def drop_loans(self, concerned: Callable[[HeldLoan], bool]) -> list[HeldLoan]:
        """End these loans; returns them. A creditor that cannot be told learns it from the ledger."""
        dropped = [loan for loan in self.loans() if concerned(loan)]
        for loan in dropped:
            self._loans[loan.request_id].remove(loan)
            if not self._loans[loan.request_id]:
                del self._loans[loan.request_id]
            self.num_borrowed -= loan.num_rblocks
            self._release(loan)
        return dropped

    def bequeath(self, request_id: str, loan_ids: Container[str]) -> None:
        """These loans go to the request's next instance; they are this one's until that has taken them over."""
        loans = self._loans.pop(request_id, [])
        for loan in loans:
            if loan.loan_id in loan_ids:
                self._bequests.add(loan)
            else:
                self._loans.setdefault(request_id, []).append(loan)

    @property
    def has_bequests(self) -> bool:
        return not self._bequests.is_empty

    def settle_bequests(self) -> None:
        self.num_borrowed -= self._bequests.settle()

    def inherit(
        self, request_id: str, creditor: InstanceId, address: str, loan_id: LoanId, used: Sequence[int]
    ) -> HeldLoan | None:
        """Take over what the request's last instance had borrowed, `used` of it; None: it cannot be had."""
        new_loan_id = self._next_loan_id()
        header = InheritHeader(loan_id, new_loan_id, self._identity.epoch)
        try:
            channel = self._peers.reach(creditor, address)
            reply = channel.call(MessageKind.INHERIT, msgspec.msgpack.encode(header), deadline_s=self._deadline_s)
            answer = decode(reply.header, LendReply)
        except DistkvError as error:
            logger.warning("%s", error)
            answer = LendReply(refusal=Refusal.STALE_CREDITOR)
        if answer.refusal is not None or not set(used) <= set(answer.block_ids):
            self._late_releases.release(new_loan_id)
            return None
        unused = deque(block_id for block_id in answer.block_ids if block_id not in set(used))
        loan = HeldLoan(new_loan_id, request_id, creditor, address, len(answer.block_ids), unused)
        self._loans.setdefault(request_id, []).append(loan)
        self.num_borrowed += loan.num_rblocks
        return loan

    def _borrow_from(self, creditor: Creditor, request_id: str, count: int) -> int:
        loan_id = self._next_loan_id()
        try:
            refusal = self._reserve(loan_id, creditor, count)
            reply = LendReply(refusal=refusal) if refusal else self._ask(loan_id, creditor, count)
        except LedgerUnavailable:
            return 0
        if reply.refusal is not None:
            logger.info("%s refuses %d rBlocks: %s", creditor.instance, count, reply.refusal.value)
            return 0
        loan = HeldLoan(loan_id, request_id, creditor.instance, creditor.address, count, deque(reply.block_ids))
        self._loans.setdefault(request_id, []).append(loan)
        self.num_borrowed += count
        return count

    def _next_loan_id(self) -> LoanId:
        self._num_asked += 1
        return new_loan_id(self._identity.instance, self._identity.epoch, self._num_asked)

    def _reserve(self, loan_id: LoanId, creditor: Creditor, count: int) -> Refusal | None:
        me = self._identity
        return self._ledger.borrow(loan_id, me.instance, me.epoch, creditor.instance, creditor.epoch, count, PENDING_S)

    def _ask(self, loan_id: LoanId, creditor: Creditor, count: int) -> LendReply:
        header = LendHeader(loan_id, self._identity.instance, self._identity.epoch, count)
        try:
            channel = self._peers.reach(creditor.instance, creditor.address)
            reply = channel.call(MessageKind.LEND, msgspec.msgpack.encode(header), deadline_s=self._deadline_s)
            answer = decode(reply.header, LendReply)
            if answer.refusal is None and len(set(answer.block_ids)) != count:
                raise DistkvError(f"{creditor.instance} gave {len(answer.block_ids)} rBlocks instead of {count}")
        except DistkvError as error:  # gone, or unable to answer
            logger.warning("%s", error)
            self._outlook.leave_alone(creditor.instance)
            answer = LendReply(refusal=Refusal.STALE_CREDITOR)
        if answer.refusal is not None:
            self._late_releases.release(loan_id)
        return answer

    def _release(self, loan: HeldLoan) -> None:
        header = msgspec.msgpack.encode(ReleaseHeader(loan.loan_id, self._identity.instance))
        try:
            channel = self._peers.reach(loan.creditor, loan.address)
            reply = channel.call(MessageKind.RELEASE, header, deadline_s=self._deadline_s)
            if decode(reply.header, Acknowledge).refusal is not None:
                self._late_releases.release(loan.loan_id)
        except DistkvError:
            self._late_releases.release(loan.loan_id)
