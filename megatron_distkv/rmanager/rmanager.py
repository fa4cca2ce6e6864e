"""The rManager of one instance: one API over local and borrowed rBlocks. The engine's thread calls it.

A request's new tokens always get local rBlocks. When those run short, the oldest full rBlocks of the longest request
move to own host memory, then to creditors, a bounded number per step, so that a context may be longer than the pool.
"""

import time
from collections.abc import Collection, Mapping, Sequence

from megatron_distkv import metrics
from megatron_distkv.config.instance import LendingConfig
from megatron_distkv.kvcache.block_table import BlockTable
from megatron_distkv.kvcache.open_slots import OpenSlots
from megatron_distkv.kvcache.rblock_allocator import RBlockAllocator
from megatron_distkv.rblock import HOST_LOAN, LoanId, Span, num_rblocks_for
from megatron_distkv.request import Request
from megatron_distkv.rmanager.backpressure import Backpressure
from megatron_distkv.rmanager.borrowing import Borrowing
from megatron_distkv.rmanager.held_loan import HeldLoan
from megatron_distkv.rmanager.homecoming import Homecoming
from megatron_distkv.rmanager.move import Move, Pull
from megatron_distkv.rmanager.outgoing import Outgoing
from megatron_distkv.rmanager.pool_outlook import PoolOutlook
from megatron_distkv.rmanager.request_tables import RequestTables
from megatron_distkv.rmanager.room import Room


class RManager:
    """Knows where every rBlock of every running request lies.

    pool        = | free | tables of running requests | vacated in this step | lent |
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
        self._tables = RequestTables(rblock_size, open_slots)
        self._outgoing = Outgoing(allocator, host, borrowing, outlook)
        self._room = Room(self._outgoing, self._tables, int(config.low_watermark * allocator.num_rblocks))
        self._backpressure = Backpressure()
        self._homecoming = Homecoming(borrowing, outlook, self._tables, config.recall_patience_s)

    def table(self, request: Request) -> BlockTable:
        return self._tables.of(request.request_id)

    def full_rblocks(self, request: Request) -> list[range]:
        return self._tables.full_rblocks(request)

    def movable_ranges(self, request: Request) -> list[range]:
        return self._tables.movable_ranges(request)

    def open_slot(self, request: Request) -> int | None:
        """Where its rBlock that is not full yet lies; None: where its table says, like all others."""
        return self._open_slots.slot_of(request.request_id)

    def spans_before(self, request: Request, position: int) -> list[Span]:
        """Where the rBlocks of positions `[0, position)` lie."""
        return self.table(request).before(num_rblocks_for(position, self.rblock_size))

    # ------------------------------------------------------------------ capacity

    @property
    def num_local_free(self) -> int:
        return self._room.num_free

    def can_admit(self, request: Request) -> bool:
        """Whether the tokens that this request has now, and one more, fit beside what running requests still need."""
        missing = self._tables.num_missing(request) - self.num_local_free
        here = self._host.num_free
        return missing <= here or missing <= here + self._outlook.borrowable_rblocks()

    def longest_context_tokens(self) -> int:
        """The longest context that this instance could hold now, with every creditor at its lending cap."""
        own = self._allocator.num_rblocks + self._host.num_rblocks
        return (own + self._outlook.most_borrowable_rblocks()) * self.rblock_size

    # ------------------------------------------------------------------ a step

    def begin_step(self) -> None:
        self._outgoing.begin_step(self._config.max_moved_rblocks_per_step)

    def grow(self, request: Request, wanted: int) -> int:
        """Make room for the first `wanted` tokens of `next_range`; returns for how many there is room (0: none)."""
        table = self._tables.enter(request)
        start = request.next_range.start
        missing = table.missing(self._rblocks_around(range(start, start + wanted)))
        self._room.make_for(len(missing))
        block_ids = self._room.take(len(missing))
        table.add_local(missing[: len(block_ids)], block_ids)
        still_missing = missing[len(block_ids) :]
        return min(wanted, still_missing[0] * self.rblock_size - start) if still_missing else wanted

    def borrow_ahead(self) -> None:
        """Below the watermark, and where running requests will still grow, move rBlocks out before there is need."""
        self._room.make_ahead()

    def bring_home(self) -> list[Request]:
        """Pull back what creditors want back, a bounded number of rBlocks; the last that a step plans.

        Returns requests for which there was no room in time: what lay there must be computed again.
        """
        loan = self._homecoming.next_loan()
        if loan is None:
            self._homecoming.find_early_ones(self.num_local_free)
            return []
        count = min(self._tables.of(loan.request_id).num_under(loan.loan_id), self._room.moves_left)
        if loan.is_asked_for:
            self._room.make_for(count)
        else:
            count = min(count, max(0, self._room.num_spare))
        self._homecoming.pull(loan, self._room.take(min(count, self._room.moves_left)))
        is_overdue = loan.overdue_at_s is not None and time.monotonic() > loan.overdue_at_s
        return self._lose(self._borrowing.drop_loans(lambda other: other is loan)) if is_overdue else []

    def take_moves(self) -> tuple[list[Move], list[Pull]]:
        """What the step must do first, the moves before the pulls."""
        return self._outgoing.take_moves(), self._homecoming.take_pulls()

    def end_step(self) -> None:
        """The step has done its moves: vacated rBlocks are free, and loans without rBlocks end."""
        self._outgoing.end_step()
        self._homecoming.end_step()

    def move_to(self, request_id: str, count: int, creditor: str) -> int:
        """Carry out a move that was planned, as far as it is possible now; returns how many rBlocks go."""
        if request_id not in self._tables.by_request:
            return 0
        return self._room.move_oldest(self._tables.request(request_id), count, creditor)

    # ------------------------------------------------------------------ endings

    def release(self, request: Request) -> None:
        """Give back everything that a request holds, here and with creditors."""
        table = self._tables.leave(request)
        if table is not None:
            self._outgoing.forget(request)
            self._allocator.free(table.local_block_ids())
            self._host.free(table.block_ids_under(HOST_LOAN))
        self._borrowing.release_all(request.request_id)

    def adopt(self, request: Request, table: BlockTable, adoption_id: str) -> None:
        """A request comes from another instance, with its KV: the table's local rBlocks are allocated for it."""
        self._open_slots.rename(adoption_id, request.request_id)
        self._tables.enter(request, table)

    def forget(self, request: Request, table: BlockTable, loan_ids: Collection[LoanId]) -> None:
        """What lay under these loans is gone, and will be computed again."""
        self._tables.lose(request, table, loan_ids)

    def lose_creditor(self, creditor: str) -> list[Request]:
        """Nothing that lay at this creditor is there any more; returns the requests whose KV must be computed again."""
        dropped = self._borrowing.drop_loans(lambda loan: loan.creditor == creditor)
        return self._lose(dropped, self._homecoming.arrived_from(creditor))

    def recall(self, loan_id: str) -> None:
        """The creditor wants this loan back: its rBlocks come home in the next steps."""
        metrics.LOANS_RECALLED.inc()
        self._homecoming.recall(loan_id)

    def note_held_back(self, held_back_s: Mapping[str, float], step_s: float) -> None:
        """A step of `step_s` seconds waited for creditors with work of their own.

        One that it has been too much for lends nothing more, and what lies there comes home as far as there is room.
        """
        for creditor in self._backpressure.note(held_back_s, step_s):
            self._homecoming.leave(creditor, self._room.num_spare)

    def reclaim_for(self, request: Request) -> None:
        """Ask debtors for as much memory back as this request, one of this instance's own, lacks."""
        self._outlook.reclaim(min(self._allocator.num_lent, self._tables.num_missing(request) - self.num_local_free))

    def reclaim_all(self) -> None:
        """This instance is about to leave: ask for everything back."""
        self._outlook.reclaim(self._allocator.num_lent)

    def check_integrity(self, kept_for_others: Sequence[int] = (), adoption_ids: Collection[str] = ()) -> None:
        """Between steps: tables in order, and every used rBlock in exactly one of them, or kept for an adoption."""
        self._outgoing.check_integrity()
        tables = self._tables.by_request.values()
        for table in tables:
            table.check_integrity()
        self._allocator.check_integrity([*kept_for_others, *(b for table in tables for b in table.local_block_ids())])
        self._open_slots.check_integrity([*self._tables.by_request, *adoption_ids])
        self._host.check_integrity([b for table in tables for b in table.block_ids_under(HOST_LOAN)])

    # ------------------------------------------------------------------ inside

    def _lose(self, loans: Sequence[HeldLoan], arrived: Sequence[tuple[str, range]] = ()) -> list[Request]:
        """What lay under these loans is gone, and what should have arrived from there holds nothing."""
        concerned = dict.fromkeys([*(loan.request_id for loan in loans), *(request_id for request_id, _ in arrived)])
        loan_ids = {loan.loan_id for loan in loans}
        for request_id in concerned:
            lost = [rblocks for other, rblocks in arrived if other == request_id]
            self._tables.lose(self._tables.request(request_id), self._tables.of(request_id), loan_ids, lost)
        return [self._tables.request(request_id) for request_id in concerned]

    def _rblocks_around(self, positions: range) -> range:
        return range(positions.start // self.rblock_size, num_rblocks_for(positions.stop, self.rblock_size))
