"""What a debtor has asked for comes later: meanwhile its creditor may be gone."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

import msgspec

from megatron_distkv.messages import Acknowledge, LendHeader, LendReply, MessageKind
from megatron_distkv.pool import EndedLoans, Identity, LoanBook, Loans, Peer, RequestOwner
from megatron_distkv.rblock import InstanceId
from tests.pool.test_candidates import Pool

MINE = RequestOwner("r")


class Later(Executor):
    """Jobs are done when a test says so."""

    def __init__(self) -> None:
        self._posted: deque[tuple[Future[Any], Callable[[], Any]]] = deque()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._posted.append((future, lambda: fn(*args, **kwargs)))
        return future

    def do_all(self) -> None:
        while self._posted:
            future, job = self._posted.popleft()
            future.set_result(job())


class Generous:
    """Lends as many rBlocks as anybody asks for, and takes all back."""

    def __init__(self) -> None:
        self.told: list[MessageKind] = []

    def ask(self, peer: Peer, kind: MessageKind, header: msgspec.Struct, answer: type[Any]) -> Any:
        self.told.append(kind)
        return LendReply(block_ids=list(range(header.num_rblocks))) if isinstance(header, LendHeader) else Acknowledge()


def test_what_a_creditor_lent_before_it_was_lost_is_not_used() -> None:
    # Given an answer of a creditor that nobody has looked at yet
    pool, jobs, control = Pool(c=(8, {})), Later(), Generous()
    me = Identity(InstanceId("me"))
    me.epoch = max(record.epoch for record in pool.ledger.snapshot().instances)  # it registered last
    book = LoanBook(pool.ledger, me)
    loans = Loans(
        book, pool.candidates, control, EndedLoans(book, pool.clock), pool.cooldown, jobs, pool.clock, enabled=True
    )  # fmt: skip
    loans.wish(MINE, 4)
    jobs.do_all()
    assert control.told == [MessageKind.LEND]
    # When that creditor is lost
    pool.lost.put("c", 30.0)
    loans.take_results()
    # Then nothing is stored there, and it is told, in case it lives
    assert (loans.usable(MINE), loans.of(MINE), loans.num_borrowed) == ([], [], 0)
    jobs.do_all()
    assert control.told == [MessageKind.LEND, MessageKind.RELEASE]
