"""The rManager of one instance: one API over local and borrowed rBlocks. The engine's thread calls it.

A request's new tokens always get local rBlocks. When those run short, the oldest full rBlocks of the longest request
move to own host memory, then to creditors, a bounded number per step, so that a context may be longer than the pool.
"""

import time
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence

from megatron_distkv.config.instance import LendingConfig
from megatron_distkv.errors import IntegrityError
from megatron_distkv.kvcache.block_table import BlockTable
from megatron_distkv.kvcache.open_slots import OpenSlots
from megatron_distkv.kvcache.rblock_allocator import RBlockAllocator
from megatron_distkv.log import get_logger
from megatron_distkv.rblock import HOST, HOST_LOAN, InstanceId, LoanId, Span, num_rblocks_for
from megatron_distkv.request import Request
from megatron_distkv.rmanager.backpressure import Backpressure
from megatron_distkv.rmanager.borrowing import Borrowing
from megatron_distkv.rmanager.held_loan import HeldLoan
from megatron_distkv.rmanager.homecoming import Homecoming
from megatron_distkv.rmanager.move import Move, Pull
from megatron_distkv.rmanager.pool_outlook import PoolOutlook

logger = get_logger(__name__)


class RManager:
    """Knows where every rBlock of every running request lies.

        pool = | free | tables of running requests | vacated in this step | lent |

    Vacated rBlocks are on their way to a creditor: the step copies them out before it writes anything, so an own
    request may take them at once, but they return to the allocator (and so to debtors) only after the step.

        host memory = | free | tables of running requests |        used before anything is borrowed
    """

    def __init__(
        self,
        allocator: RBlockAllocator,
        host: RBlockAllocator,
        borrowing: Borrowing,
        outlook: PoolOutlook,
        config: LendingConfig,
        rblock_size: int,
        open_slots: OpenSlots,
    ) -> None:
        self._open_slots = open_slots
        self._allocator = allocator
        self._host = host
        self._borrowing = borrowing
        self._outlook = outlook
        self._config = config
        self.rblock_size = rblock_size
        self._requests: dict[str, Request] = {}
        self._tables: dict[str, BlockTable] = {}
        self._vacated: list[int] = []
        self._moves: list[Move] = []
        self._moves_left = config.max_moved_rblocks_per_step
        self._backpressure = Backpressure()
        self._homecoming = Homecoming(borrowing, outlook, config.recall_patience_s)

    def table(self, request: Request) -> BlockTable:
        return self._tables[request.request_id]

    def open_slot(self, request: Request) -> int | None:
        """Where its rBlock that is not full yet lies; None: where its table says, like all others."""
        return self._open_slots.slot_of(request.request_id)

    def spans_before(self, request: Request, position: int) -> list[Span]:
        """Where the rBlocks of positions `[0, position)` lie."""
        return self.table(request).before(num_rblocks_for(position, self.rblock_size))

    # ------------------------------------------------------------------ capacity

    @property
    def num_local_free(self) -> int:
        return self._allocator.num_free + len(self._vacated)

    def can_admit(self, request: Request) -> bool:
        """Whether the tokens that this request has now, and one more, fit beside what running requests still need."""
        missing = self._num_missing(request)
        here = self._host.num_free
        return missing <= here or missing <= here + self._outlook.borrowable_rblocks()

    def longest_context_tokens(self) -> int:
        """The longest context that this instance could hold now, with every creditor at its lending cap."""
        own = self._allocator.num_rblocks + self._host.num_rblocks
        return (own + self._outlook.most_borrowable_rblocks()) * self.rblock_size

    # ------------------------------------------------------------------ a step

    def begin_step(self) -> None:
        self._moves_left = self._config.max_moved_rblocks_per_step

    def grow(self, request: Request, wanted: int) -> int:
        """Make room for the first `wanted` tokens of `next_range`; returns for how many there is room (0: none)."""
        self._requests[request.request_id] = request
        self._open_slots.take(request.request_id)
        table = self._tables.setdefault(request.request_id, BlockTable())
        start = request.next_range.start
        missing = table.missing(self._rblocks_around(range(start, start + wanted)))
        if len(missing) > self.num_local_free:
            self._make_room(len(missing) - self.num_local_free)
        block_ids = self._take_local(len(missing))
        table.add_local(missing[: len(block_ids)], block_ids)
        still_missing = missing[len(block_ids) :]
        return min(wanted, still_missing[0] * self.rblock_size - start) if still_missing else wanted

    def borrow_ahead(self) -> None:
        """Below the watermark, and where running requests will still grow, move rBlocks out before there is need."""
        target = min(self._watermark, self._growth_until_the_end())
        if self.num_local_free < target:
            self._make_room(target - self.num_local_free)

    def bring_home(self) -> list[Request]:
        """Pull back what creditors want back, a bounded number of rBlocks; the last that a step plans.

        Returns requests for which there was no room in time: what lay there must be computed again.
        """
        loan = self._homecoming.next_loan()
        if loan is None:
            self._find_early_homecomings()
            return []
        count = min(self._tables[loan.request_id].num_under(loan.loan_id), self._moves_left)
        if not loan.is_asked_for:
            count = min(count, max(0, self.num_local_free - self._watermark))
        elif count > self.num_local_free:
            self._make_room(count - self.num_local_free)
        self._homecoming.pull(loan, self._tables[loan.request_id], self._take_local(min(count, self._moves_left)))
        is_overdue = loan.overdue_at_s is not None and time.monotonic() > loan.overdue_at_s
        return self._lose(self._borrowing.drop_loans(lambda other: other is loan)) if is_overdue else []

    def _find_early_homecomings(self) -> None:
        """rBlocks whose creditors do not mind, where asking for them costs more than bringing them home (paper: 5).

        Only where all that runs fits here until its end: what comes home will not have to leave again for it.
        """
        for loan in self._borrowing.loans():
            request, table = self._requests[loan.request_id], self._tables[loan.request_id]
            count, way = table.num_under(loan.loan_id), self._outlook.way_to(loan.creditor)
            steps_left = request.max_total_tokens - request.num_tokens
            if way is None or count == 0 or count * way.break_even_steps > steps_left:
                continue
            if count + self._growth_until_the_end() <= self.num_local_free:
                self._homecoming.bring_when_there_is_room(loan)
                return

    def _growth_until_the_end(self) -> int:
        return sum(self._growth(request, request.max_total_tokens) for request in self._requests.values())

    def take_moves(self) -> tuple[list[Move], list[Pull]]:
        """What the step must do first, the moves before the pulls."""
        moves, self._moves = self._moves, []
        return moves, self._homecoming.take_pulls()

    def end_step(self) -> None:
        """The step has done its moves: vacated rBlocks are free, and loans without rBlocks end."""
        self._allocator.free(self._vacated)
        self._vacated = []
        self._homecoming.end_step(self._tables)

    def move_to(self, request_id: str, count: int, creditor: str) -> int:
        """Carry out a move that was planned, as far as it is possible now; returns how many rBlocks go."""
        request = self._requests.get(request_id)
        return 0 if request is None else self._move_oldest(request, min(count, self._moves_left), only_to=creditor)

    # ------------------------------------------------------------------ endings

    def release(self, request: Request) -> None:
        """Give back everything that a request holds, here and with creditors."""
        table = self._tables.pop(request.request_id, None)
        self._requests.pop(request.request_id, None)
        self._open_slots.give_back(request.request_id)
        if table is not None:
            self._moves = [move for move in self._moves if move.request_id != request.request_id]
            self._allocator.free(table.local_block_ids())
            self._host.free(table.block_ids_under(HOST_LOAN))
        self._borrowing.release_all(request.request_id)

    def adopt(self, request: Request, table: BlockTable, adoption_id: str) -> None:
        """A request comes from another instance, with its KV: the table's local rBlocks are allocated for it."""
        self._open_slots.rename(adoption_id, request.request_id)
        self._requests[request.request_id] = request
        self._tables[request.request_id] = table

    def forget(self, request: Request, table: BlockTable, loan_ids: Collection[LoanId]) -> None:
        """What lay under these loans is gone, and will be computed again."""
        size = self.rblock_size
        spans = table.remove_loans(loan_ids)
        lost = [range(x.first * size, (x.first + len(x.block_ids)) * size) for x in spans]
        request.lose(*lost, *self._open_ranges(request))

    def lose_creditor(self, creditor: str) -> list[Request]:
        """Nothing that lay at this creditor is there any more; returns the requests whose KV must be computed again."""
        dropped = self._borrowing.drop_loans(lambda loan: loan.creditor == creditor)
        return self._lose(dropped, self._homecoming.arrived_from(creditor))

    def recall(self, loan_id: str) -> None:
        """The creditor wants this loan back: its rBlocks come home in the next steps."""
        self._homecoming.recall(loan_id)

    def note_held_back(self, held_back_s: Mapping[str, float], step_s: float) -> None:
        """A step of `step_s` seconds waited for creditors with work of their own.

        One that it has been too much for lends nothing more, and what lies there comes home as far as there is room.
        """
        for creditor in self._backpressure.note(held_back_s, step_s):
            self._outlook.leave_alone(creditor)
            room = self.num_local_free - self._watermark
            for loan in [x for x in self._borrowing.loans() if x.creditor == creditor and not x.is_recalled]:
                room -= self._tables[loan.request_id].num_under(loan.loan_id)
                if room >= 0:
                    logger.info("%s is busy: bringing %d rBlocks home", creditor, loan.num_rblocks)
                    self._homecoming.bring_when_there_is_room(loan)

    def reclaim_for(self, request: Request) -> None:
        """Ask debtors for as much memory back as this request, one of this instance's own, lacks."""
        self._outlook.reclaim(min(self._allocator.num_lent, self._num_missing(request)))

    def reclaim_all(self) -> None:
        """This instance is about to leave: ask for everything back."""
        self._outlook.reclaim(self._allocator.num_lent)

    def check_integrity(self, kept_for_others: Sequence[int] = (), adoption_ids: Collection[str] = ()) -> None:
        """Between steps: tables in order, and every used rBlock in exactly one of them, or kept for an adoption."""
        if self._vacated or self._moves:
            raise IntegrityError(f"{len(self._vacated)} vacated rBlocks, {len(self._moves)} moves outlived their step")
        tables = self._tables.values()
        for table in tables:
            table.check_integrity()
        self._allocator.check_integrity([*kept_for_others, *(b for table in tables for b in table.local_block_ids())])
        self._open_slots.check_integrity([*self._tables, *adoption_ids])
        self._host.check_integrity([b for table in tables for b in table.block_ids_under(HOST_LOAN)])

    # ------------------------------------------------------------------ inside

    @property
    def _watermark(self) -> int:
        """rBlocks that should be free."""
        return int(self._config.low_watermark * self._allocator.num_rblocks)

    def _lose(self, loans: Sequence[HeldLoan], arrived: Sequence[tuple[str, range]] = ()) -> list[Request]:
        """What lay under these loans is gone, and what should have arrived from there holds nothing."""
        concerned = dict.fromkeys([*(loan.request_id for loan in loans), *(request_id for request_id, _ in arrived)])
        loan_ids = {loan.loan_id for loan in loans}
        for request_id in concerned:
            spans = self._tables[request_id].remove_loans(loan_ids)
            lost = [range(span.first, span.first + len(span.block_ids)) for span in spans]
            lost += [rblocks for other, rblocks in arrived if other == request_id]
            size = self.rblock_size
            request = self._requests[request_id]
            request.lose(*(range(x.start * size, x.stop * size) for x in lost), *self._open_ranges(request))
        return [self._requests[request_id] for request_id in concerned]

    def _rblocks_around(self, positions: range) -> range:
        return range(positions.start // self.rblock_size, num_rblocks_for(positions.stop, self.rblock_size))

    def full_rblocks(self, request: Request) -> list[range]:
        """rBlocks all of whose positions have their KV: only they may leave."""
        size = self.rblock_size
        return [range(num_rblocks_for(have.start, size), have.stop // size) for have in request.computed_ranges()]

    def movable_ranges(self, request: Request) -> list[range]:
        """Positions whose KV could go to another instance: all that are computed, less those in open slots."""
        if not self._open_slots.are_needed:
            return request.computed_ranges()
        size = self.rblock_size
        return [range(x.start * size, x.stop * size) for x in self.full_rblocks(request) if x]

    def _open_ranges(self, request: Request) -> list[range]:
        """What is lost with any other loss: a step that fails may have written over it in its slot."""
        if not self._open_slots.are_needed:
            return []
        size = self.rblock_size
        return [range(max(x.start, x.stop // size * size), x.stop) for x in request.computed_ranges()]

    def _num_missing(self, request: Request) -> int:
        """rBlocks that this request's tokens and one more lack here, beside what running requests still need."""
        others = sum(self._growth(x, x.num_tokens + 1) for x in self._requests.values() if x is not request)
        return self._growth(request, request.num_tokens + 1) + others - self.num_local_free

    def _growth(self, request: Request, num_tokens: int) -> int:
        num_tokens = min(num_tokens, request.max_total_tokens)  # nobody needs the last token's KV
        table = self._tables.get(request.request_id)
        return max(0, num_rblocks_for(num_tokens, self.rblock_size) - (table.num_rblocks if table else 0))

    def _take_local(self, count: int) -> list[int]:
        vacated = self._vacated[:count] if count > 0 else []
        del self._vacated[: len(vacated)]
        return vacated + self._allocator.allocate_up_to(max(0, count - len(vacated)))

    def _make_room(self, count: int) -> None:
        """Move up to `count` rBlocks out: the oldest full ones of the longest request first."""
        count = min(count, self._moves_left)
        for request in self._longest_first():
            if count <= 0:
                return
            count -= self._move_oldest(request, count)

    def _longest_first(self) -> Iterable[Request]:
        return sorted(self._requests.values(), key=lambda request: request.num_computed_tokens, reverse=True)

    def _move_oldest(self, request: Request, count: int, only_to: str | None = None) -> int:
        table = self._tables[request.request_id]
        full = self.full_rblocks(request)
        movable = sum(len(span.block_ids) for span in table.oldest_local(count, full))
        room = [] if only_to else [self._host_room(request, movable)]
        missing = movable - sum(len(x.unused) for x in room) - self._borrowing.num_unused(request.request_id)
        if missing > 0 and self._outlook.may_ask():
            borrowed = self._borrowing.borrow(request.request_id, missing, only_to)
            self._outlook.note_answer(got_all=borrowed >= missing)
        moved = 0
        for loan in [*room, *self._borrowing.usable_loans_of(request.request_id)]:
            while loan.unused and moved < movable:
                moved += self._move_into(loan, table, movable - moved, full)
        self._moves_left -= moved
        return moved

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
