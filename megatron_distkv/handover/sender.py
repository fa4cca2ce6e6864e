"""An instance that leaves gives its running requests to others, with their KV: nothing is computed again.

One request at a time. A successor is asked for room; the request's full rBlocks, which never change, are copied there
while it goes on; when a step can copy all that is left, the request stands still, and the successor is told the rest:
where it stopped, and which of its rBlocks lie with creditors. Questions are jobs, whose answers later steps find. Until
the successor has said yes, everything stays here, so whoever is lost on the way costs nothing. (Of an int8 cache the
rBlock that is not full yet stays behind: the successor computes those few tokens again.) Then the gateway is told where
to ask, and the successor takes the loans over in its own name.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple, Protocol

from megatron_distkv.clock import Clock
from megatron_distkv.handover.client import HandoverClient, new_handover_id
from megatron_distkv.handover.session import HandoverSession, Phase, RBlockHere, rblocks_here
from megatron_distkv.log import get_logger
from megatron_distkv.messages import HandedOver, Refusal
from megatron_distkv.pool import HeldLoan, Identity, Loans, Member, Peer, Picture, RequestOwner
from megatron_distkv.rblock import num_rblocks_for
from megatron_distkv.request import Request, RequestStatus
from megatron_distkv.rmanager import Move, RManager

logger = get_logger(__name__)
# Where no successor has room, all are looked at again after this.
RETRY_S = 0.1


class Requests(Protocol):
    """Those of this instance (engine.Scheduler)."""

    @property
    def waiting(self) -> Collection[Request]: ...
    @property
    def running(self) -> Sequence[Request]: ...
    def settle(self, request: Request) -> None:
        """Let its receipt say what it has held until now."""

    def let_go(self, request: Request) -> None:
        """It goes on elsewhere."""


class _Successor(NamedTuple):
    """Who could go on with requests; one of them may have `most_rblocks` there, when nobody else uses any memory."""

    member: Member
    most_rblocks: int


class Sender:
    """`begin_step`, `plan` (after the step's requests are chosen), `end_step`. The engine's thread calls it.

    `picture`: of the pool, as it was seen last; None before that.
    """

    def __init__(
        self,
        picture: Callable[[], Picture | None],
        identity: Identity,
        client: HandoverClient,
        loans: Loans,
        rmanager: RManager,
        requests: Requests,
        max_rblocks_per_step: int,
        clock: Clock,
    ) -> None:
        self._picture = picture
        self._identity = identity
        self._client = client
        self._loans = loans
        self._rmanager = rmanager
        self._requests = requests
        self._max_rblocks_per_step = max_rblocks_per_step
        self._clock = clock
        self._session: HandoverSession | None = None
        self._begin_again_at_s = float("-inf")
        self._final_notices: list[HandedOver] = []

    @property
    def successor(self) -> str:
        """To whom a request is going now; empty: none is."""
        return "" if self._session is None else self._session.successor.instance

    def begin_step(self) -> None:
        """Take what has been answered; then ask at most one thing."""
        if self._session is not None:
            self._take_answer(self._session)
        session = self._session
        if session is None:
            self._begin()
        elif session.phase is Phase.COPYING:
            self._make_ready(session)

    def plan(self) -> list[Move]:
        """What this step copies to the successor."""
        session = self._session
        if session is None or session.phase is not Phase.COPYING or not session.goes_on:
            return []
        return session.plan(self._left(session, whole=session.stands_still), self._max_rblocks_per_step)

    def end_step(self, lost: Mapping[str, str]) -> None:
        """These members were lost in this step."""
        session = self._session
        if session is None:
            return
        if session.successor.instance in lost or not session.goes_on:
            self.give_up()
            return
        session.note_copied()
        if session.phase is Phase.COPYING and session.stands_still and not self._left(session, whole=True):
            self._commit(session)

    def take_final_notices(self) -> list[HandedOver]:
        """What gateways are to be told of requests that go on elsewhere."""
        notices, self._final_notices = self._final_notices, []
        return notices

    def give_up(self) -> None:
        """The request that is on its way stays, or another successor is looked for."""
        session, self._session = self._session, None
        if session is None:
            return
        logger.info("%s does not go to %s", session.request.request_id, session.successor.instance)
        if session.stands_still:
            session.request.status = RequestStatus.RUNNING
        self._client.give_up(session.successor, session.handover_id, after=session.question)
        self._begin_again_at_s = float("-inf")

    # ------------------------------------------------------------------ whom to ask

    def _begin(self) -> None:
        if self._clock.monotonic_s() < self._begin_again_at_s:
            return
        picture = self._picture()
        successors = [] if picture is None else self._successors(picture)
        if picture is None or not successors:
            return
        self._send_away_what_has_no_kv()
        for request in self._requests.running:
            needed = self._num_here(request) + 1
            suited = [x.member for x in successors if self._suits(x, request, needed)]
            to_ask = [x for x in suited if self._client.may_ask(x.instance)]
            if to_ask:
                successor = min(to_ask, key=lambda x: self._client.refused_at_s(x.instance))  # of equals the freest
                self._start(request, successor, needed)
                return
        self._begin_again_at_s = self._clock.monotonic_s() + RETRY_S
        if self._requests.running:
            self._make_smaller(self._requests.running[0], successors[0].member, picture)

    def _successors(self, picture: Picture) -> list[_Successor]:
        """Who could go on with requests, the freest first: on this host, as its gateway is."""
        others = [x for x in picture.up if x.instance != self._identity.instance]
        others = [x for x in others if not self._client.has_lost(x.instance)]
        num_lendable = sum(x.lendable_at_most for x in others)
        able = [x for x in others if x.takes_requests_here]
        able.sort(key=lambda member: member.free, reverse=True)
        return [_Successor(x, x.total + x.host_rblocks + num_lendable - x.lendable_at_most) for x in able]

    def _suits(self, successor: _Successor, request: Request, needed: int) -> bool:
        """Whether by the picture it has room, and could hold the request to its end."""
        in_the_end = num_rblocks_for(request.max_total_tokens, self._rmanager.rblock_size)
        return needed <= successor.member.free and in_the_end <= successor.most_rblocks

    def _send_away_what_has_no_kv(self) -> None:
        for request in [*self._requests.waiting, *self._requests.running]:
            if request.num_computed_tokens == 0:
                self._requests.let_go(request)
                self._final_notices.append(HandedOver(request.request_id))

    def _make_smaller(self, request: Request, successor: Member, picture: Picture) -> None:
        """Nobody has room for all of it: let others than the freest hold some, as loans that go along with it."""
        excess = self._num_here(request) + 1 - successor.free
        others = [x for x in picture.live if x.instance not in (successor.instance, self._identity.instance)]
        freest = max((x for x in others if x.free_to_lend > 0), key=lambda x: x.free_to_lend, default=None)
        if excess > 0 and freest is not None:
            self._rmanager.move_to(request.request_id, min(excess, freest.free_to_lend), freest.instance)

    # ------------------------------------------------------------------ one request

    def _start(self, request: Request, successor: Member, needed: int) -> None:
        session = HandoverSession(request, successor, new_handover_id(self._identity))
        session.slack = min(session.slack, successor.free - needed)
        self._session = session
        self._prepare(session, needed)

    def _prepare(self, session: HandoverSession, needed: int) -> None:
        session.phase = Phase.PREPARING
        session.question = self._client.prepare(session.successor, session.handover_id, needed + session.slack)

    def _take_answer(self, session: HandoverSession) -> None:
        """Of the question under way, if it has come and the request still goes on."""
        if not session.goes_on:
            self.give_up()
            return
        if session.question is None or not session.question.done():
            return
        answer, session.question = session.question.result(), None
        if session.phase is Phase.COMMITTING:
            self._finish(session) if answer and self._still_holds(session) else self.give_up()
        elif answer.refusal is None:
            session.phase, session.block_ids = Phase.COPYING, answer.block_ids
        elif answer.refusal is Refusal.FULL and session.there and session.slack:
            session.phase, session.slack = Phase.COPYING, 0  # what it needs may fit
        else:
            self.give_up()

    def _make_ready(self, session: HandoverSession) -> None:
        """Ask for more room, or let the request stand still when the rest of it fits into this step."""
        left = self._left(session, whole=True)
        needed = len(session.there) + len(left)
        if needed > len(session.block_ids):
            session.request.status = RequestStatus.RUNNING
            self._prepare(session, needed)
        elif len(left) <= self._max_rblocks_per_step:
            session.request.status = RequestStatus.LEAVING

    def _left(self, session: HandoverSession, *, whole: bool) -> dict[int, RBlockHere]:
        """What is not at the successor yet; without `whole` only the rBlocks that never change any more."""
        request = session.request
        of = self._movable(request) if whole else self._rmanager.full_rblocks(request)
        return rblocks_here(self._rmanager.table(request), of, session.there)

    def _num_here(self, request: Request) -> int:
        return len(rblocks_here(self._rmanager.table(request), self._movable(request), ()))

    def _movable(self, request: Request) -> list[range]:
        """Its rBlocks that can go to another instance."""
        size = self._rmanager.rblock_size
        return [range(x.start // size, num_rblocks_for(x.stop, size)) for x in self._rmanager.movable_ranges(request)]

    def _commit(self, session: HandoverSession) -> None:
        """All its rBlocks are at the successor or with creditors."""
        request = session.request
        self._requests.settle(request)
        table, kept = self._rmanager.table(request), self._rmanager.movable_ranges(request)
        peers: dict[str, Peer] = {loan.loan_id: loan.peer for loan in self._loans_of(session)}
        session.header = session.describe(table, peers, kept, self._clock.monotonic_s())
        session.phase = Phase.COMMITTING
        session.question = self._client.commit(session.successor, session.header)

    def _still_holds(self, session: HandoverSession) -> bool:
        """Whether no loan that the successor was told of has been fetched back meanwhile."""
        return _loan_ids(session) <= {loan.loan_id for loan in self._loans_of(session)}

    def _loans_of(self, session: HandoverSession) -> list[HeldLoan]:
        return self._loans.of(RequestOwner(session.request.request_id))

    def _finish(self, session: HandoverSession) -> None:
        """The successor has the request."""
        request, successor = session.request, session.successor.instance
        self._session = None
        self._begin_again_at_s = float("-inf")
        self._loans.transfer(RequestOwner(request.request_id), _loan_ids(session))
        self._requests.let_go(request)
        logger.info("%s goes on in %s", request.request_id, successor)
        self._final_notices.append(HandedOver(request.request_id, successor, session.handover_id))


def _loan_ids(session: HandoverSession) -> set[str]:
    return set() if session.header is None else {span.loan_id for span in session.header.elsewhere}
