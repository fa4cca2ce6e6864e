"""An instance that leaves gives its running requests to others, with their KV: nothing is computed again.

One request at a time. Its full rBlocks, which never change, are copied to a successor while it goes on; when a step can
copy all that is left, the request stands still for that step, and the successor is told the rest: where it stopped, and
which of its rBlocks lie with creditors. Until the successor has said yes, everything stays here, so whoever is lost on
the way costs nothing. (Of an int8 cache the rBlock that is not full yet stays behind: the successor computes those few
tokens again.) Then the gateway is told where to ask, and the successor takes the loans over in its own name.
"""

import time
from collections.abc import Mapping

from megatron_distkv.engine.passage import Passage, RBlockHere
from megatron_distkv.engine.scheduler import Scheduler
from megatron_distkv.errors import LedgerUnavailable
from megatron_distkv.log import get_logger
from megatron_distkv.messages import HandedOver
from megatron_distkv.pool import DebtLedger, Identity, InstanceState, Loans, Member, RequestOwner, picture_of
from megatron_distkv.rblock import num_rblocks_for
from megatron_distkv.request import Request, RequestStatus
from megatron_distkv.rmanager import Move, RManager, SuccessorDesk, new_adoption_id
from megatron_distkv.transport import is_elsewhere

logger = get_logger(__name__)
# Without anybody who has room, all are asked again after this.
RETRY_S = 0.1


class Handover:
    """`begin_step`, `plan` (after the step's requests are chosen), `end_step`. The engine's thread calls it."""

    def __init__(
        self,
        ledger: DebtLedger,
        identity: Identity,
        desk: SuccessorDesk,
        loans: Loans,
        rmanager: RManager,
        scheduler: Scheduler,
        max_rblocks_per_step: int,
    ) -> None:
        self._ledger = ledger
        self._identity = identity
        self._desk = desk
        self._loans = loans
        self._rmanager = rmanager
        self._scheduler = scheduler
        self._max_rblocks_per_step = max_rblocks_per_step
        self._passage: Passage | None = None
        self._retry_at_s = float("-inf")
        self.farewells: list[HandedOver] = []

    def begin_step(self) -> None:
        """Choose the next request, or let the present one stand still when the rest of it fits into this step."""
        passage = self._passage
        if passage is not None and not passage.goes_on:
            self._give_up()
        elif passage is not None and len(self._left(passage, whole=True)) <= self._max_rblocks_per_step:
            passage.request.status = RequestStatus.LEAVING
        elif passage is None and time.monotonic() >= self._retry_at_s:
            self._retry_at_s = time.monotonic() + RETRY_S
            self._begin()

    def plan(self) -> list[Move]:
        """What this step copies to the successor."""
        passage = self._passage
        if passage is None or not passage.goes_on:
            return []
        left = self._left(passage, whole=passage.request.status is RequestStatus.LEAVING)
        chosen = dict(list(left.items())[: self._max_rblocks_per_step])
        if not self._has_room_for(passage, len(passage.there) + len(chosen)):
            self._give_up()
            return []
        return passage.plan(chosen)

    def end_step(self, lost: Mapping[str, str]) -> None:
        passage = self._passage
        if passage is None:
            return
        if passage.successor.instance in lost or not passage.goes_on:
            self._give_up()
            self._retry_at_s = float("-inf")  # with another
            return
        passage.arrive()
        if passage.request.status is RequestStatus.LEAVING and not self._left(passage, whole=True):
            self._close(passage)

    def take_farewells(self) -> list[HandedOver]:
        farewells, self.farewells = self.farewells, []
        return farewells

    # ------------------------------------------------------------------ begin

    def _begin(self) -> None:
        successors = self._successors()
        if not successors:
            return
        for request in [x for x in self._all() if x.num_computed_tokens == 0]:
            self._scheduler.let_go(request)
            self.farewells.append(HandedOver(request.request_id))
        for request in self._scheduler.running:
            for successor in successors:
                if self._passage is None:
                    self._passage = self._start(request, successor)
        if self._passage is None and self._scheduler.running:
            self._make_smaller(self._scheduler.running[0], successors[0])

    def _all(self) -> list[Request]:
        return [*self._scheduler.waiting, *self._scheduler.running]

    def _successors(self) -> list[Member]:
        """Who could go on with a request, the freest first: on this host, as its gateway is."""
        able = [x for x in self._live() if x.takes_requests and x.state is InstanceState.UP]
        able = [x for x in able if not is_elsewhere(x.address)]
        others = [x for x in able if x.instance != self._identity.instance and not self._desk.has_lost(x.instance)]
        return sorted(others, key=lambda record: record.free, reverse=True)

    def _live(self) -> tuple[Member, ...]:
        try:
            return picture_of(self._ledger.snapshot()).live
        except LedgerUnavailable:
            return ()

    def _start(self, request: Request, successor: Member) -> Passage | None:
        if num_rblocks_for(request.max_total_tokens, self._rmanager.rblock_size) > self._most(successor):
            return None  # it would never end there
        adoption_id = new_adoption_id(self._identity)
        passage = Passage(request, successor, adoption_id)
        return passage if self._has_room_for(passage, len(self._left(passage, whole=True)) + 1) else None

    def _most(self, successor: Member) -> int:
        """rBlocks that a request may ever have there, without this instance and who was lost a moment ago."""
        others = (x for x in self._live() if x.instance not in (successor.instance, self._identity.instance))
        others = (x for x in others if not self._desk.has_lost(x.instance))
        lendable = sum(record.lendable_at_most for record in others if record.state is InstanceState.UP)
        return successor.total + successor.host_rblocks + lendable

    def _make_smaller(self, request: Request, successor: Member) -> None:
        """Nobody has room for all of it: let others than the freest hold some, as loans that go along with it."""
        left = self._left(Passage(request, successor, adoption_id=""), whole=True)
        excess = len(left) + 1 - successor.free
        others = [x for x in self._live() if x.instance not in (successor.instance, self._identity.instance)]
        freest = max((x for x in others if x.free_to_lend > 0), key=lambda x: x.free_to_lend, default=None)
        if excess > 0 and freest is not None:
            self._rmanager.move_to(request.request_id, min(excess, freest.free_to_lend), freest.instance)

    def _left(self, passage: Passage, *, whole: bool) -> dict[int, RBlockHere]:
        """What is not at the successor yet; without `whole` only the rBlocks that never change any more."""
        request, size = passage.request, self._rmanager.rblock_size
        movable = self._rmanager.movable_ranges(request)
        all_of_it = [range(x.start // size, num_rblocks_for(x.stop, size)) for x in movable]
        of = all_of_it if whole else self._rmanager.full_rblocks(request)
        return passage.left(self._rmanager.table(request), of)

    def _has_room_for(self, passage: Passage, num_rblocks: int) -> bool:
        if num_rblocks <= len(passage.block_ids):
            return True
        block_ids = self._desk.prepare(passage.successor, passage.adoption_id, num_rblocks)
        passage.block_ids = block_ids or passage.block_ids
        return bool(block_ids)

    # ------------------------------------------------------------------ close

    def _close(self, passage: Passage) -> None:
        """All its rBlocks are at the successor or with creditors."""
        request = passage.request
        loans = self._loans.of(RequestOwner(request.request_id))
        self._scheduler.settle(request)
        table, kept = self._rmanager.table(request), self._rmanager.movable_ranges(request)
        adoption = passage.describe(table, {loan.loan_id: loan.peer for loan in loans}, kept)
        if not self._desk.hand_over(passage.successor, adoption):
            self._give_up()
            return
        self._passage = None
        self._retry_at_s = float("-inf")
        self._loans.transfer(RequestOwner(request.request_id), {span.loan_id for span in adoption.elsewhere})
        self._scheduler.let_go(request)
        logger.info("%s goes on in %s", request.request_id, passage.successor.instance)
        self.farewells.append(HandedOver(request.request_id, passage.successor.instance, passage.adoption_id))

    def _give_up(self) -> None:
        passage, self._passage = self._passage, None
        assert passage is not None
        logger.info("%s does not go to %s", passage.request.request_id, passage.successor.instance)
        if passage.request.status is RequestStatus.LEAVING:
            passage.request.status = RequestStatus.RUNNING
        self._desk.give_up(passage.successor, passage.adoption_id)
