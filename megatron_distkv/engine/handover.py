"""An instance that leaves gives its running requests to others, with their KV: nothing is computed again.

One request at a time. Its full rBlocks, which never change, are copied to a successor while it goes on; when a step can
copy all that is left, the request stands still for that step, and the successor is told the rest: where it stopped, and
which of its rBlocks lie with creditors. Until the successor has said yes, everything stays here, so whoever is lost on
the way costs nothing. (Of an int8 cache the rBlock that is not full yet stays behind: the successor computes those few
tokens again.) Then the gateway is told where to ask, and the successor takes the loans over in its own name.
"""

import time
from collections.abc import Container, Mapping
from dataclasses import dataclass, field

from msgspec.structs import replace

from megatron_distkv.engine.receipt import receipt
from megatron_distkv.engine.scheduler import Scheduler
from megatron_distkv.errors import LedgerUnavailable
from megatron_distkv.ledger import DebtLedger, InstanceRecord, InstanceState
from megatron_distkv.log import get_logger
from megatron_distkv.messages import AdoptHeader, HandedOver, InheritedSpan
from megatron_distkv.rblock import HOST, LocalSpan, Span, num_rblocks_for
from megatron_distkv.request import Request, RequestStatus, gaps_before
from megatron_distkv.rmanager import Borrowing, Identity, Move, RManager, SuccessorDesk, new_adoption_id

logger = get_logger(__name__)
# Without anybody who has room, all are asked again after this.
RETRY_S = 0.1


@dataclass
class _Passage:
    """A request on its way. `there`: its rBlock -> physical id at the successor, where it has been copied to."""

    request: Request
    successor: InstanceRecord
    adoption_id: str
    block_ids: list[int]
    setbacks: tuple[int, int]
    there: dict[int, int] = field(default_factory=dict)
    planned: dict[int, int] = field(default_factory=dict)


class Handover:
    """`begin_step`, `plan` (after the step's requests are chosen), `end_step`. The engine's thread calls it."""

    def __init__(
        self,
        ledger: DebtLedger,
        identity: Identity,
        desk: SuccessorDesk,
        borrowing: Borrowing,
        rmanager: RManager,
        scheduler: Scheduler,
        max_rblocks_per_step: int,
    ) -> None:
        self._ledger = ledger
        self._identity = identity
        self._desk = desk
        self._borrowing = borrowing
        self._rmanager = rmanager
        self._scheduler = scheduler
        self._max_rblocks_per_step = max_rblocks_per_step
        self._passage: _Passage | None = None
        self._retry_at_s = float("-inf")
        self.farewells: list[HandedOver] = []

    def begin_step(self) -> None:
        """Choose the next request, or let the present one stand still when the rest of it fits into this step."""
        passage = self._passage
        if passage is not None and not _goes_on(passage):
            self._give_up()
        elif passage is not None and len(self._left(passage, whole=True)) <= self._max_rblocks_per_step:
            passage.request.status = RequestStatus.LEAVING
        elif passage is None and time.monotonic() >= self._retry_at_s:
            self._retry_at_s = time.monotonic() + RETRY_S
            self._begin()

    def plan(self) -> list[Move]:
        """What this step copies to the successor."""
        passage = self._passage
        if passage is None or not _goes_on(passage):
            return []
        left = self._left(passage, whole=passage.request.status is RequestStatus.LEAVING)
        chosen = dict(list(left.items())[: self._max_rblocks_per_step])
        if not self._has_room_for(passage, len(passage.there) + len(chosen)):
            self._give_up()
            return []
        free = [block_id for block_id in passage.block_ids if block_id not in set(passage.there.values())]
        passage.planned = dict(zip(chosen, free, strict=False))
        return [*_copies(passage, chosen, from_host=False), *_copies(passage, chosen, from_host=True)]

    def end_step(self, lost: Mapping[str, str]) -> None:
        passage = self._passage
        if passage is None:
            return
        if passage.successor.instance in lost or not _goes_on(passage):
            self._give_up()
            self._retry_at_s = float("-inf")  # with another
            return
        passage.there.update(passage.planned)
        passage.planned = {}
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

    def _successors(self) -> list[InstanceRecord]:
        """Who could go on with a request, the freest first."""
        able = [x for x in self._live() if x.takes_requests and x.state is InstanceState.UP]
        others = [x for x in able if x.instance != self._identity.instance and not self._desk.shuns(x.instance)]
        return sorted(others, key=lambda record: record.free, reverse=True)

    def _live(self) -> tuple[InstanceRecord, ...]:
        try:
            return self._ledger.snapshot().live
        except LedgerUnavailable:
            return ()

    def _start(self, request: Request, successor: InstanceRecord) -> _Passage | None:
        if num_rblocks_for(request.max_total_tokens, self._rmanager.rblock_size) > self._most(successor):
            return None  # it would never end there
        adoption_id = new_adoption_id(self._identity)
        setbacks = request.num_preemptions, request.num_recomputed_tokens
        passage = _Passage(request, successor, adoption_id, [], setbacks)
        return passage if self._has_room_for(passage, len(self._left(passage, whole=True)) + 1) else None

    def _most(self, successor: InstanceRecord) -> int:
        """rBlocks that a request may ever have there, without this instance."""
        others = (x for x in self._live() if x.instance not in (successor.instance, self._identity.instance))
        lendable = sum(record.lendable_at_most for record in others if record.state is InstanceState.UP)
        return successor.total + successor.host_rblocks + lendable

    def _make_smaller(self, request: Request, successor: InstanceRecord) -> None:
        """Nobody has room for all of it: let others than the freest hold some, as loans that go along with it."""
        left = self._left(_Passage(request, successor, "", [], (0, 0)), whole=True)
        excess = len(left) + 1 - successor.free
        for creditor in self._live():
            if excess > 0 and creditor.instance not in (successor.instance, self._identity.instance):
                excess -= self._rmanager.move_to(request.request_id, excess, creditor.instance)
                self._retry_at_s = float("-inf")  # before it has grown again

    def _has_room_for(self, passage: _Passage, num_rblocks: int) -> bool:
        if num_rblocks <= len(passage.block_ids):
            return True
        block_ids = self._desk.prepare(passage.successor, passage.adoption_id, num_rblocks)
        passage.block_ids = block_ids or passage.block_ids
        return bool(block_ids)

    # ------------------------------------------------------------------ copy

    def _left(self, passage: _Passage, *, whole: bool) -> dict[int, tuple[int, bool]]:
        """rBlocks here that are not at the successor yet: rBlock -> physical id, and whether in host memory.

        Without `whole` only those that never change any more.
        """
        request, size = passage.request, self._rmanager.rblock_size
        movable = self._rmanager.movable_ranges(request)
        whole_rblocks = [range(x.start // size, num_rblocks_for(x.stop, size)) for x in movable]
        of = whole_rblocks if whole else self._rmanager.full_rblocks(request)
        left: dict[int, tuple[int, bool]] = {}
        for span in self._rmanager.table(request).spans:
            if not isinstance(span, LocalSpan) and span.creditor != HOST:
                continue
            for rblock, block_id in enumerate(span.block_ids, start=span.first):
                if rblock not in passage.there and any(rblock in rblocks for rblocks in of):
                    left[rblock] = (block_id, not isinstance(span, LocalSpan))
        return left

    # ------------------------------------------------------------------ close

    def _close(self, passage: _Passage) -> None:
        """All its rBlocks are at the successor or with creditors."""
        request = passage.request
        elsewhere = self._elsewhere(passage)
        self._scheduler.settle(request)
        if not self._desk.hand_over(passage.successor, self._describe(passage, elsewhere)):
            self._give_up()
            return
        self._passage = None
        self._retry_at_s = float("-inf")
        self._borrowing.bequeath(request.request_id, {span.loan_id for span in elsewhere})
        self._scheduler.let_go(request)
        logger.info("%s goes on in %s", request.request_id, passage.successor.instance)
        self.farewells.append(HandedOver(request.request_id, passage.successor.instance, passage.adoption_id))

    def _describe(self, passage: _Passage, elsewhere: list[InheritedSpan]) -> AdoptHeader:
        request = passage.request
        kept = self._rmanager.movable_ranges(request)
        num_left = request.num_computed_tokens - request.num_lost_tokens - sum(len(piece) for piece in kept)
        kv = receipt(request)
        held = {rblock for span in self._rmanager.table(request).spans for rblock in _rblocks(span)}
        return AdoptHeader(
            passage.adoption_id,
            len(request.prompt_token_ids),
            len(request.output_token_ids),
            kept[-1].stop if kept else 0,
            [(lost.start, lost.stop) for lost in gaps_before(kept)],
            request.sampling_seed,
            time.monotonic() - request.arrival_s,
            replace(kv, num_recomputed_tokens=kv.num_recomputed_tokens + num_left),
            {rblock: block_id for rblock, block_id in passage.there.items() if rblock in held},
            elsewhere,
        )

    def _elsewhere(self, passage: _Passage) -> list[InheritedSpan]:
        """Spans with creditors, less what has been copied before it went there."""
        addresses = {loan.loan_id: loan.address for loan in self._borrowing.loans_of(passage.request.request_id)}
        return [
            InheritedSpan(first, block_ids, span.creditor, addresses[span.loan_id], span.loan_id)
            for span in self._rmanager.table(passage.request).remote_spans()
            if span.creditor != HOST
            for first, block_ids in _runs(span, without=passage.there)
        ]

    def _give_up(self) -> None:
        passage, self._passage = self._passage, None
        assert passage is not None
        logger.info("%s does not go to %s", passage.request.request_id, passage.successor.instance)
        if passage.request.status is RequestStatus.LEAVING:
            passage.request.status = RequestStatus.RUNNING
        self._desk.give_up(passage.successor, passage.adoption_id)


def _goes_on(passage: _Passage) -> bool:
    """It has neither ended nor lost anything since its passage began."""
    request = passage.request
    if (request.num_preemptions, request.num_recomputed_tokens) != passage.setbacks:
        return False
    return request.status in (RequestStatus.RUNNING, RequestStatus.LEAVING)


def _copies(passage: _Passage, chosen: Mapping[int, tuple[int, bool]], *, from_host: bool) -> list[Move]:
    """From the pool, or from own host memory."""
    rblocks = [rblock for rblock, (_, is_in_host) in chosen.items() if is_in_host == from_host]
    if not rblocks:
        return []
    local_ids = [chosen[rblock][0] for rblock in rblocks]
    remote_ids = [passage.planned[rblock] for rblock in rblocks]
    to = passage.successor
    return [
        Move(passage.request.request_id, to.instance, to.address, passage.adoption_id, local_ids, remote_ids, from_host)
    ]


def _rblocks(span: Span) -> range:
    return range(span.first, span.first + len(span.block_ids))


def _runs(span: Span, without: Container[int]) -> list[tuple[int, list[int]]]:
    """The parts of a span that remain: first rBlock, physical ids."""
    runs: list[tuple[int, list[int]]] = []
    for rblock, block_id in zip(_rblocks(span), span.block_ids, strict=True):
        if rblock in without:
            continue
        if runs and runs[-1][0] + len(runs[-1][1]) == rblock:
            runs[-1][1].append(block_id)
        else:
            runs.append((rblock, [block_id]))
    return runs
