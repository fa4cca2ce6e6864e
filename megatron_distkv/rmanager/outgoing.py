"""rBlocks that leave the pool: to own host memory first, then to creditors; the other way round where that is dear."""

from collections import deque
from collections.abc import Sequence

from megatron_distkv.errors import IntegrityError
from megatron_distkv.kvcache.block_table import BlockTable
from megatron_distkv.kvcache.rblock_allocator import RBlockAllocator
from megatron_distkv.rblock import HOST, HOST_LOAN, InstanceId, LoanId
from megatron_distkv.request import Request
from megatron_distkv.rmanager.borrowing import Borrowing
from megatron_distkv.rmanager.held_loan import HeldLoan
from megatron_distkv.rmanager.move import Move
from megatron_distkv.rmanager.pool_outlook import PoolOutlook


class Outgoing:
    """One step's moves, at most `moves_left` more of them, and the rBlocks that they vacate.

    Vacated rBlocks are on their way to a creditor: the step copies them out before it writes anything, so an own
    request may take them at once, but they return to the allocator (and so to debtors) only after the step.
    """

    def __init__(
        self, allocator: RBlockAllocator, host: RBlockAllocator, borrowing: Borrowing, outlook: PoolOutlook
    ) -> None:
        self._allocator = allocator
        self._host = host
        self._borrowing = borrowing
        self._outlook = outlook
        self._vacated: list[int] = []
        self._moves: list[Move] = []
        self.moves_left = 0

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

    def take_free(self, count: int) -> list[int]:
        """Up to `count` rBlocks for own requests."""
        vacated = self._vacated[:count] if count > 0 else []
        del self._vacated[: len(vacated)]
        return vacated + self._allocator.allocate_up_to(max(0, count - len(vacated)))

    # ------------------------------------------------------------------ moves

    def take_moves(self) -> list[Move]:
        moves, self._moves = self._moves, []
        return moves

    def forget(self, request: Request) -> None:
        """It has ended: what was to move needs not."""
        self._moves = [move for move in self._moves if move.request_id != request.request_id]

    def move_oldest(
        self, request: Request, table: BlockTable, full: Sequence[range], count: int, only_to: str | None = None
    ) -> int:
        """Move up to `count` of the request's oldest full rBlocks out; returns how many go."""
        movable = sum(len(span.block_ids) for span in table.oldest_local(count, full))
        moved = 0
        for loan in self._rooms(request, movable, only_to):
            while loan.unused and moved < movable:
                moved += self._move_into(loan, table, movable - moved, full)
        self.moves_left -= moved
        return moved

    def _rooms(self, request: Request, count: int, only_to: str | None) -> list[HeldLoan]:
        """For up to `count` rBlocks of the request, in the order of use."""
        if only_to is not None:
            return self._loans(request, count, only_to)
        if self._outlook.host_memory_is_dear():
            loans = self._loans(request, count, None)
            return [*loans, self._host_room(request, count - sum(len(x.unused) for x in loans))]
        room = self._host_room(request, count)
        return [room, *self._loans(request, count - len(room.unused), None)]

    def _loans(self, request: Request, count: int, only_to: str | None) -> list[HeldLoan]:
        missing = count - self._borrowing.num_unused(request.request_id)
        if missing > 0 and self._outlook.may_ask():
            borrowed = self._borrowing.borrow(request.request_id, missing, only_to)
            self._outlook.note_answer(got_all=borrowed >= missing)
        return self._borrowing.usable_loans_of(request.request_id)

    def _host_room(self, request: Request, count: int) -> HeldLoan:
        """Up to `count` rBlocks of own host memory, as if lent."""
        block_ids = self._host.allocate_up_to(count)
        return HeldLoan(HOST_LOAN, request.request_id, HOST, "", len(block_ids), deque(block_ids))

    def _move_into(self, loan: HeldLoan, table: BlockTable, count: int, full: Sequence[range]) -> int:
        span = table.oldest_local(count, full)[0]
        remote_ids = loan.take(len(span.block_ids))
        left = table.move_to_creditor(span.first, remote_ids, InstanceId(loan.creditor), LoanId(loan.loan_id))
        self._vacated.extend(left)
        self._moves.append(Move(loan.request_id, loan.creditor, loan.address, loan.loan_id, left, remote_ids))
        return len(left)

    def check_integrity(self) -> None:
        """Between steps."""
        if self._vacated or self._moves:
            raise IntegrityError(f"{len(self._vacated)} vacated rBlocks, {len(self._moves)} moves outlived their step")
