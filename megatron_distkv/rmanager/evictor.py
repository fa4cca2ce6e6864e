"""Room in the pool for running requests: what is free there, and more where their oldest rBlocks move out.

To own host memory first, then to creditors; the other way round where host memory answers much later.
"""

from collections import deque
from collections.abc import Sequence

from megatron_distkv.errors import IntegrityError
from megatron_distkv.kvcache.block_table import BlockTable
from megatron_distkv.kvcache.rblock_allocator import RBlockAllocator
from megatron_distkv.pool import Candidates, HeldLoan, Loans, Peer, RequestOwner
from megatron_distkv.rblock import HOST, HOST_LOAN, InstanceId, LoanId
from megatron_distkv.request import Request
from megatron_distkv.rmanager.move import Move
from megatron_distkv.rmanager.request_tables import RequestTables

_HOST_PEER = Peer(HOST, 0, "")


class Evictor:
    """One step's moves, at most `moves_left` more of them, and the rBlocks that they vacate.

    Vacated rBlocks are on their way to a creditor: the step copies them out before it writes anything, so an own
    request may take them at once, but they return to the allocator (and so to debtors) only after the step.

    `watermark`: as many rBlocks should be free where a request grows past its instance.
    """

    def __init__(
        self,
        allocator: RBlockAllocator,
        host: RBlockAllocator,
        loans: Loans,
        candidates: Candidates,
        tables: RequestTables,
        watermark: int,
    ) -> None:
        self._allocator = allocator
        self._host = host
        self._loans = loans
        self._candidates = candidates
        self._tables = tables
        self._watermark = watermark
        self._vacated: list[int] = []
        self._moves: list[Move] = []
        self.moves_left = 0
        """rBlocks that this step may still move, in either direction."""

    def begin_step(self, max_moves: int) -> None:
        self.moves_left = max_moves

    def end_step(self) -> None:
        """The step has done its moves."""
        self._allocator.free(self._vacated)
        self._vacated = []

    # ------------------------------------------------------------------ vacated and free

    @property
    def num_free(self) -> int:
        return self._allocator.num_free + len(self._vacated)

    @property
    def num_spare(self) -> int:
        """Free beyond the watermark; negative below it."""
        return self.num_free - self._watermark

    def take(self, count: int) -> list[int]:
        """Up to `count` free rBlocks, for own requests."""
        vacated = self._vacated[:count] if count > 0 else []
        del self._vacated[: len(vacated)]
        return vacated + self._allocator.allocate_up_to(max(0, count - len(vacated)))

    # ------------------------------------------------------------------ room

    def make_room(self, count: int) -> None:
        """Until `count` rBlocks are free, or no more may move: the oldest full ones of the longest request first."""
        missing = min(count - self.num_free, self.moves_left)
        for request in self._tables.longest_first() if missing > 0 else ():
            missing -= self.evict(request, missing)
            if missing <= 0 or self._loans.num_wished(RequestOwner(request.request_id)):
                return  # what is on its way for this one is no reason to move others

    def make_room_ahead(self) -> None:
        """Where a request will outgrow this instance, before there is need; a full pool of others gains nothing."""
        if self._tables.longest_end() > self._allocator.num_rblocks + self._host.num_rblocks:
            self.make_room(min(self._watermark, self._tables.growth_until_the_end()))

    def wish_ahead(self, num_tokens: int) -> None:
        """Borrow now what running requests lack within their next `num_tokens` tokens: a loan takes as long to come."""
        host_free = 0 if self._candidates.host_memory_is_slow() else self._host.num_free
        coming = self.num_free + host_free + self._loans.num_coming
        missing = self._tables.growth_within(num_tokens) - coming
        for request in self._tables.longest_first() if missing > 0 else ():
            owner = RequestOwner(request.request_id)
            wanted = min(missing, self._tables.num_movable_in_the_end(request) - self._loans.num_unused(owner))
            if wanted > 0 and not self._loans.num_wished(owner):
                self._loans.wish(owner, wanted)
                missing -= wanted

    # ------------------------------------------------------------------ moves

    def evict(self, request: Request, count: int, only_to: str | None = None) -> int:
        """Move up to `count` of the request's oldest full rBlocks out; returns how many go now.

        What there is no room for yet is wished for: it goes in a later step.
        """
        table, full = self._tables.of(request.request_id), self._tables.full_rblocks(request)
        movable = sum(len(span.block_ids) for span in table.oldest_local(min(count, self.moves_left), full))
        moved = 0
        for loan in self._places(request, movable, only_to):
            while loan.unused and moved < movable:
                moved += self._move_into(loan, table, movable - moved, full)
        self.moves_left -= moved
        return moved

    def take_moves(self) -> list[Move]:
        moves, self._moves = self._moves, []
        return moves

    def forget(self, request: Request) -> None:
        """It has ended: what was to move needs not."""
        self._moves = [move for move in self._moves if move.request_id != request.request_id]

    def check_integrity(self) -> None:
        """Between steps."""
        if self._vacated or self._moves:
            raise IntegrityError(f"{len(self._vacated)} vacated rBlocks, {len(self._moves)} moves outlived their step")

    def _places(self, request: Request, count: int, only_to: str | None) -> list[HeldLoan]:
        """For up to `count` rBlocks of the request, in the order of use."""
        if only_to is not None:
            return [loan for loan in self._borrowed(request, count, only_to) if loan.creditor == only_to]
        have_room = [loan.creditor for loan in self._loans.usable(RequestOwner(request.request_id))]
        if self._candidates.host_memory_is_slow(have_room):
            loans = self._borrowed(request, count, None)
            return [*loans, self._host_room(request, count - sum(len(x.unused) for x in loans))]
        room = self._host_room(request, count)
        return [room, *self._borrowed(request, count - len(room.unused), None)]

    def _borrowed(self, request: Request, count: int, only_from: str | None) -> list[HeldLoan]:
        owner = RequestOwner(request.request_id)
        usable = [x for x in self._loans.usable(owner) if only_from in (None, x.creditor)]
        self._loans.wish(owner, count - sum(len(x.unused) for x in usable), only_from)
        return self._loans.usable(owner)

    def _host_room(self, request: Request, count: int) -> HeldLoan:
        """Up to `count` rBlocks of own host memory, as if lent."""
        block_ids = self._host.allocate_up_to(count)
        return HeldLoan(HOST_LOAN, RequestOwner(request.request_id), _HOST_PEER, len(block_ids), deque(block_ids))

    def _move_into(self, loan: HeldLoan, table: BlockTable, count: int, full: Sequence[range]) -> int:
        span = table.oldest_local(count, full)[0]
        remote_ids = loan.take(len(span.block_ids))
        left = table.move_to_creditor(span.first, remote_ids, InstanceId(loan.creditor), LoanId(loan.loan_id))
        self._vacated.extend(left)
        self._moves.append(Move(loan.request_id, loan.peer, loan.loan_id, left, remote_ids))
        return len(left)
