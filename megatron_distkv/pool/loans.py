"""Loans that this instance has taken: wished for in one step, found in a later one.

A job asks: candidates -> reserve in the ledger -> LEND (the creditor allocates and accepts). Another ends a loan. The
engine's thread only posts jobs and takes what has come of them: it waits neither for the ledger nor for a creditor.
"""

from collections import deque
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import msgspec

from megatron_distkv.clock import Clock
from megatron_distkv.errors import DistkvError, LedgerUnavailable
from megatron_distkv.ledger import CreditorOffer
from megatron_distkv.log import get_logger
from megatron_distkv.messages import (
    Acknowledge,
    InheritHeader,
    LendHeader,
    LendReply,
    MessageKind,
    Refusal,
    ReleaseHeader,
)
from megatron_distkv.pool.candidates import Candidates
from megatron_distkv.pool.ended_loans import EndedLoans
from megatron_distkv.pool.loan_book import LoanBook
from megatron_distkv.pool.member import Peer
from megatron_distkv.pool.quarantine import Quarantine
from megatron_distkv.rblock import InstanceId, LoanId, LoanKey, loan_key, new_loan_id

logger = get_logger(__name__)
# A wish that was not granted in full is not posted again at every step.
RETRY_S = 0.05
# A creditor that cannot answer, or wants memory back, is not asked for more in this time.
COOLDOWN_S = 2.0
# A debtor that has not taken a loan over by then never will.
TRANSFER_WITHIN_S = 10.0
# How often the ledger is asked whether it has.
LOOK_INTERVAL_S = 0.2
# To the ledger, one after the other: candidates, reservation, and the creditor's acceptance.
ROUND_TRIPS = 3
# The share of the newest measurement in the mean of how long a loan takes.
NEWEST_SHARE = 0.3
_Reply = TypeVar("_Reply")


@dataclass(frozen=True)
class RequestOwner:
    """Whose loan it is: it ends with this request at the latest."""

    request_id: str


class Control(Protocol):
    """Short questions to other members' leaders, on channels of their own. Any thread may ask."""

    def ask(self, peer: Peer, kind: MessageKind, header: msgspec.Struct, answer: type[_Reply]) -> _Reply:
        """Raises DistkvError: it is gone, silent for too long, or cannot answer."""
        ...


@dataclass(eq=False)
class HeldLoan:
    """A loan of `num_rblocks` rBlocks; those not used yet wait in `unused`.

    A loan that its creditor wants back has a time at which it is overdue, and takes nothing in any more. One that is to
    be fetched back without being recalled is never overdue (infinity).
    """

    loan_id: LoanId = field(repr=False)  # a secret: no log may have it
    owner: RequestOwner
    peer: Peer
    num_rblocks: int
    unused: deque[int] = field(default_factory=deque)
    overdue_at_s: float | None = None

    @property
    def key(self) -> LoanKey:
        return loan_key(self.loan_id)

    @property
    def creditor(self) -> InstanceId:
        return InstanceId(self.peer.instance)

    @property
    def request_id(self) -> str:
        return self.owner.request_id

    @property
    def is_leaving(self) -> bool:
        return self.overdue_at_s is not None

    @property
    def is_recalled(self) -> bool:
        """By its creditor."""
        return self.overdue_at_s is not None and self.overdue_at_s != float("inf")

    def take(self, count: int) -> list[int]:
        """Up to `count` physical ids in the creditor's pool, to be filled now."""
        return [self.unused.popleft() for _ in range(min(count, len(self.unused)))]


@dataclass(frozen=True)
class _Wish:
    count: int
    posted_s: float
    loans: "Future[list[HeldLoan]]"


class Loans:
    """The engine's thread calls it; `num_borrowed` may be read by any."""

    def __init__(
        self,
        book: LoanBook,
        candidates: Candidates,
        control: Control,
        ended: EndedLoans,
        cooldown: Quarantine,
        jobs: Executor,
        clock: Clock,
        *,
        enabled: bool,
    ) -> None:
        self._enabled = enabled
        self._book = book
        self._candidates = candidates
        self._control = control
        self._ended = ended
        self._cooldown = cooldown
        self._jobs = jobs
        self._clock = clock
        self._held: dict[RequestOwner, list[HeldLoan]] = {}
        self._wishes: dict[RequestOwner, _Wish] = {}
        self._unwanted: list[Future[list[HeldLoan]]] = []  # whose owner has ended
        self._tasks: list[Future[None]] = []  # releases and links, under way
        self._wish_again_at_s = float("-inf")
        self._transfers: dict[HeldLoan, float] = {}  # to other debtors, with the time when each is given up
        self._look: Future[set[LoanKey]] | None = None
        self._look_again_at_s = float("-inf")
        self._num_ids = 0
        self.num_borrowed = 0  # rBlocks of all loans
        self._mean_s = 0.0  # that a wish has taken of late, granted or not

    # ------------------------------------------------------------------ what is held

    def all(self) -> Iterator[HeldLoan]:
        return (loan for loans in self._held.values() for loan in loans)

    def of(self, owner: RequestOwner) -> list[HeldLoan]:
        return self._held.get(owner, [])

    def usable(self, owner: RequestOwner) -> list[HeldLoan]:
        return [loan for loan in self.of(owner) if loan.unused and not loan.is_leaving]

    def num_unused(self, owner: RequestOwner) -> int:
        return sum(len(loan.unused) for loan in self.usable(owner))

    @property
    def latency_s(self) -> float:
        """How long it takes at present from a wish to its loan: at least what the ledger is away."""
        return max(self._mean_s, ROUND_TRIPS * self._candidates.ledger_round_trip_s)

    # ------------------------------------------------------------------ wishes

    def wish(self, owner: RequestOwner, count: int, only_from: str | None = None) -> None:
        """Borrow `count` rBlocks, over several creditors if need be; one wish of each owner is under way at a time."""
        now_s = self._clock.monotonic_s()
        if not self._enabled or count <= 0 or owner in self._wishes or now_s < self._wish_again_at_s:
            return
        self._wishes[owner] = _Wish(count, now_s, self._jobs.submit(self._borrow, owner, count, only_from))
        self.take_results()  # of jobs that are done at once

    def num_wished(self, owner: RequestOwner) -> int:
        wish = self._wishes.get(owner)
        return 0 if wish is None else wish.count

    @property
    def num_coming(self) -> int:
        """rBlocks that are held for later, or wished for."""
        unused = sum(len(loan.unused) for loan in self.all() if not loan.is_leaving)
        return unused + sum(wish.count for wish in self._wishes.values())

    def take_results(self) -> None:
        """What has come of wishes; never waits."""
        for owner, wish in [(owner, wish) for owner, wish in self._wishes.items() if wish.loans.done()]:
            del self._wishes[owner]
            self._take(owner, wish)
        self._unwanted = [wish for wish in self._unwanted if not wish.done()]
        self._tasks = [task for task in self._tasks if not _is_over(task)]

    def _take(self, owner: RequestOwner, wish: _Wish) -> None:
        now_s, loans = self._clock.monotonic_s(), wish.loans.result()
        took_s = now_s - wish.posted_s
        self._mean_s = NEWEST_SHARE * took_s + (1 - NEWEST_SHARE) * (self._mean_s or took_s)
        if sum(loan.num_rblocks for loan in loans) < wish.count:
            self._wish_again_at_s = now_s + RETRY_S
        for loan in loans:
            self.take_over(loan)
            if self._candidates.is_lost(loan.creditor):  # since it lent this
                self._drop(loan)

    # ------------------------------------------------------------------ endings

    def end(self, owner: RequestOwner) -> None:
        """The owner has ended: so do its loans, and what it has wished for."""
        wish = self._wishes.pop(owner, None)
        if wish is not None:
            self._unwanted.append(wish.loans)
            wish.loans.add_done_callback(self._end_unwanted)
        self.drop(lambda loan: loan.owner == owner)
        self.take_results()

    def drop(self, concerned: Callable[[HeldLoan], bool]) -> list[HeldLoan]:
        """End these loans; returns them. A creditor that cannot be told learns it from the ledger."""
        dropped = [loan for loan in self.all() if concerned(loan)]
        for loan in dropped:
            self._drop(loan)
        return dropped

    def _drop(self, loan: HeldLoan) -> None:
        self._forget(loan)
        self._release(loan)

    def _forget(self, loan: HeldLoan) -> None:
        self._held[loan.owner].remove(loan)
        if not self._held[loan.owner]:
            del self._held[loan.owner]
        self.num_borrowed -= loan.num_rblocks

    def flush(self, within_s: float) -> None:
        """Before this instance ends: wait for what is under way, `within_s` at most."""
        until_s = self._clock.monotonic_s() + within_s
        while self._wishes or self._unwanted or self._tasks:
            self.take_results()
            if self._clock.monotonic_s() > until_s:
                return
            self._clock.sleep(0.005)

    # ------------------------------------------------------------------ to and from other debtors

    def transfer(self, owner: RequestOwner, loan_ids: Container[str]) -> None:
        """These go to another debtor; they stay this one's until that has taken them over."""
        until_s = self._clock.monotonic_s() + TRANSFER_WITHIN_S
        for loan in [loan for loan in self.of(owner) if loan.loan_id in loan_ids]:
            self._held[owner].remove(loan)
            self._transfers[loan] = until_s

    @property
    def has_transfers(self) -> bool:
        return bool(self._transfers)

    def settle_transfers(self) -> None:
        """Forget what is another debtor's by now, and end what nobody took over; never waits."""
        if self._look is not None and self._look.done():
            look, self._look = self._look, None
            try:
                self._settle(look.result())
            except LedgerUnavailable:
                return
        elif self._look is None and self._transfers and self._clock.monotonic_s() >= self._look_again_at_s:
            self._look_again_at_s = self._clock.monotonic_s() + LOOK_INTERVAL_S
            self._look = self._jobs.submit(self._book.known, [loan.key for loan in self._transfers])

    def _settle(self, known: set[LoanKey]) -> None:
        now_s = self._clock.monotonic_s()
        for loan, until_s in list(self._transfers.items()):
            if loan.key not in known or until_s < now_s:
                del self._transfers[loan]
                self.num_borrowed -= loan.num_rblocks
                if loan.key in known:
                    self._release(loan)

    def inherit(
        self, owner: RequestOwner, peer: Peer, loan_id: LoanId, used: Sequence[int]
    ) -> "Future[HeldLoan | None]":
        """Take over what another debtor has borrowed for this owner, `used` of it; None: it cannot be had.

        A job; `take_over` what it brings.
        """
        return self._jobs.submit(self._inherit, owner, peer, loan_id, frozenset(used))

    def take_over(self, loan: HeldLoan) -> None:
        self._held.setdefault(loan.owner, []).append(loan)
        self.num_borrowed += loan.num_rblocks

    # ------------------------------------------------------------------ jobs

    def _borrow(self, owner: RequestOwner, count: int, only_from: str | None) -> list[HeldLoan]:
        """Asks as many creditors as it takes: the freest may refuse, or be lost while its lease still runs."""
        loans: list[HeldLoan] = []
        try:
            candidates = self._candidates.look(count if only_from is None else float("inf"))
            for candidate in candidates:
                if count > 0 and only_from in (None, candidate.name):
                    loan = self._borrow_from(candidate.creditor, owner, min(count, candidate.creditor.free_rblocks))
                    loans += [loan] if loan is not None else []
                    count -= loan.num_rblocks if loan is not None else 0
        except LedgerUnavailable as error:
            logger.debug("no loan: %s", error)
        if loans:
            self._jobs.submit(self._candidates.learn_links, tuple(loan.creditor for loan in loans))
        return loans

    def _borrow_from(self, creditor: CreditorOffer, owner: RequestOwner, count: int) -> HeldLoan | None:
        loan_id, peer = self._next_id(), Peer(creditor.instance, creditor.epoch, creditor.address)
        refusal = self._book.reserve(loan_id, creditor, count)
        reply = LendReply(refusal=refusal) if refusal else self._lend(loan_id, peer, count)
        if reply.refusal is not None:
            logger.info("%s refuses %d rBlocks: %s", creditor.instance, count, reply.refusal.value)
            return None
        self._cooldown.forgive(creditor.instance)
        return HeldLoan(loan_id, owner, peer, count, deque(reply.block_ids))

    def _lend(self, loan_id: LoanId, peer: Peer, count: int) -> LendReply:
        me = self._book.identity
        header = LendHeader(loan_id, me.instance, me.epoch, count)
        try:
            answer = self._control.ask(peer, MessageKind.LEND, header, LendReply)
            if answer.refusal is None and len(set(answer.block_ids)) != count:
                raise DistkvError(f"{peer.instance} gave {len(answer.block_ids)} rBlocks instead of {count}")
        except DistkvError as error:  # gone, or unable to answer
            logger.warning("%s", error)
            self._cooldown.put_for_failing(peer.instance, COOLDOWN_S)
            answer = LendReply(refusal=Refusal.STALE_CREDITOR)
        if answer.refusal is not None:
            self._ended.add(loan_id)
        return answer

    def _inherit(self, owner: RequestOwner, peer: Peer, loan_id: LoanId, used: frozenset[int]) -> HeldLoan | None:
        new_id = self._next_id()
        header = InheritHeader(loan_id, new_id, self._book.identity.epoch)
        try:
            answer = self._control.ask(peer, MessageKind.INHERIT, header, LendReply)
        except DistkvError as error:
            logger.warning("%s", error)
            answer = LendReply(refusal=Refusal.STALE_CREDITOR)
        if answer.refusal is not None or not used <= set(answer.block_ids):
            self._ended.add(new_id)
            return None
        unused = deque(block_id for block_id in answer.block_ids if block_id not in used)
        return HeldLoan(new_id, owner, peer, len(answer.block_ids), unused)

    def _release(self, loan: HeldLoan) -> None:
        self._tasks.append(self._jobs.submit(self._tell_of_end, loan))

    def _end_unwanted(self, loans: "Future[list[HeldLoan]]") -> None:
        """Of an owner that has ended meanwhile; whoever's thread this is, so that it needs no step."""
        for loan in [] if loans.cancelled() or loans.exception() else loans.result():
            self._release(loan)

    def _tell_of_end(self, loan: HeldLoan) -> None:
        header = ReleaseHeader(loan.loan_id, self._book.identity.instance)
        try:
            is_known = self._control.ask(loan.peer, MessageKind.RELEASE, header, Acknowledge).refusal is None
        except DistkvError:
            is_known = False
        if not is_known:
            self._ended.add(loan.loan_id)

    def _next_id(self) -> LoanId:
        """Several jobs may take one at once: the random part tells them apart."""
        self._num_ids += 1
        return new_loan_id(self._book.identity.instance, self._book.identity.epoch, self._num_ids)


def _is_over(task: "Future[None]") -> bool:
    """Raises what ended it, if that was an exception: jobs expect what may go wrong."""
    if not task.done():
        return False
    task.result()
    return True
