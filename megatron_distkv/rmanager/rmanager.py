"""The rManager of one instance: one API over local and borrowed rBlocks. The engine's thread calls it.

A request's new tokens always get local rBlocks. When those run short, the oldest full rBlocks of the longest request
move to own host memory, then to creditors, a bounded number per step, so that a context may be longer than the pool.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

from megatron_distkv.clock import Clock
from megatron_distkv.config.instance import LendingConfig
from megatron_distkv.kvcache.block_table import BlockTable
from megatron_distkv.kvcache.open_slots import OpenSlots
from megatron_distkv.kvcache.rblock_allocator import RBlockAllocator
from megatron_distkv.pool import Candidates, HeldLoan, Links, Loans, Quarantine, RequestOwner
from megatron_distkv.rblock import HOST_LOAN, LoanId, LoanKey, Span, num_rblocks_for
from megatron_distkv.request import Request
from megatron_distkv.rmanager.backpressure import Backpressure
from megatron_distkv.rmanager.evictor import Evictor
from megatron_distkv.rmanager.fetch_back import FetchBack
from megatron_distkv.rmanager.move import Move, Pull
from megatron_distkv.rmanager.request_tables import RequestTables

# No loan is asked for further ahead of its need, however far away the ledger is.
MAX_TOKENS_AHEAD = 1024
# A planned move is as old as the picture that it was planned from: what cannot be done by then is left.
PLAN_HOLDS_S = 5.0


class PlannedMove(NamedTuple):
    """So many of a request's rBlocks are to go to `creditor`, until then."""

    num_rblocks: int
    creditor: str
    until_s: float


class RManager:
    """Knows where every rBlock of every running request lies.

    pool        = | free | tables of running requests | vacated in this step | lent |
    host memory = | free | tables of running requests |        used before anything is borrowed
    """

    def __init__(
        self,
        allocator: RBlockAllocator,
        host: RBlockAllocator,
        loans: Loans,
        candidates: Candidates,
        links: Links,
        cooldown: Quarantine,
        config: LendingConfig,
        rblock_size: int,
        open_slots: OpenSlots,
        clock: Clock,
        want_totals: Callable[[], None],
        ask_back: Callable[[int], None],
    ) -> None:
        """Neither waits. `want_totals`: what the pool could lend is asked for anew soon. `ask_back`: so many rBlocks
        that this instance lends are recalled.
        """
        self._open_slots = open_slots
        self._allocator = allocator
        self._host = host
        self._loans = loans
        self._candidates = candidates
        self._config = config
        self._clock = clock
        self._want_totals = want_totals
        self._ask_back = ask_back
        self.rblock_size = rblock_size
        self._tables = RequestTables(rblock_size, open_slots)
        watermark = int(config.low_watermark * allocator.num_rblocks)
        self._evictor = Evictor(allocator, host, loans, candidates, self._tables, watermark)
        self._backpressure = Backpressure()
        self._fetch_back = FetchBack(loans, links, cooldown, self._tables, config.recall_patience_s, clock)
        self._step_s = 0.0  # mean of late
        self._planned: dict[str, PlannedMove] = {}  # by request

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
        return self._evictor.num_free

    def can_admit(self, request: Request) -> bool:
        """Whether the tokens that this request has now, and one more, fit beside what running requests still need."""
        missing = self._tables.num_missing(request) - self.num_local_free - self._host.num_free
        if missing <= 0 or missing <= self._loans.num_coming + self._candidates.borrowable_rblocks:
            return True
        self._want_totals()
        return False

    def longest_context_tokens(self) -> int:
        """The longest context that this instance could hold now, with every creditor at its lending cap."""
        own = self._allocator.num_rblocks + self._host.num_rblocks
        return (own + self._candidates.max_borrowable_rblocks) * self.rblock_size

    # ------------------------------------------------------------------ a step

    def begin_step(self) -> None:
        """Take what has come of wishes."""
        self._loans.take_results()
        self._evictor.begin_step(self._config.max_moved_rblocks_per_step)
        self._carry_out_plans()

    def grow(self, request: Request, wanted: int) -> int:
        """Make room for the first `wanted` tokens of `next_range`; returns for how many there is room (0: none)."""
        table = self._tables.enter(request)
        start = request.next_range.start
        missing = table.missing(self._rblocks_around(range(start, start + wanted)))
        self._evictor.make_room(len(missing))
        block_ids = self._evictor.take(len(missing))
        table.add_local(missing[: len(block_ids)], block_ids)
        still_missing = missing[len(block_ids) :]
        return min(wanted, still_missing[0] * self.rblock_size - start) if still_missing else wanted

    def borrow_ahead(self) -> None:
        """Ask now for what must be there when a loan that is asked for now can have come."""
        if self._tables.by_request:
            self._evictor.make_room_ahead()
            self._evictor.wish_ahead(self._tokens_until_a_loan_comes())

    def _tokens_until_a_loan_comes(self) -> int:
        """That a decoding request makes in that time: one step, one token."""
        if not self._step_s:
            return 1
        return min(MAX_TOKENS_AHEAD, 1 + math.ceil(self._loans.latency_s / self._step_s))

    @property
    def step_s(self) -> float:
        """How long steps take of late; 0 before the first."""
        return self._step_s

    @property
    def loan_latency_s(self) -> float:
        """How long it takes at present from a wish to its loan."""
        return self._loans.latency_s

    def fetch_back(self) -> list[Request]:
        """Pull back what creditors want back, a bounded number of rBlocks; the last that a step plans.

        Returns requests for which there was no room in time: what lay there must be computed again.
        """
        loan = self._fetch_back.next_loan()
        if loan is None:
            self._fetch_back.find_early_ones(self.num_local_free)
            return []
        count = min(self._tables.of(loan.request_id).num_under(loan.loan_id), self._evictor.moves_left)
        if loan.is_recalled:
            self._evictor.make_room(count)
        else:
            count = min(count, max(0, self._evictor.num_spare))
        self._fetch_back.pull(loan, self._evictor.take(min(count, self._evictor.moves_left)))
        is_overdue = loan.overdue_at_s is not None and self._clock.monotonic_s() > loan.overdue_at_s
        return self._lose(self._loans.drop(lambda other: other is loan)) if is_overdue else []

    def take_moves(self) -> tuple[list[Move], list[Pull]]:
        """What the step must do first, the moves before the pulls."""
        return self._evictor.take_moves(), self._fetch_back.take_pulls()

    def end_step(self) -> None:
        """The step has done its moves: vacated rBlocks are free, and loans without rBlocks end."""
        self._evictor.end_step()
        self._fetch_back.end_step()

    def move_to(self, request_id: str, count: int, creditor: str) -> None:
        """Carry out a move that was planned, as far as it is possible within a few steps."""
        self._planned[request_id] = PlannedMove(count, creditor, self._clock.monotonic_s() + PLAN_HOLDS_S)

    def _carry_out_plans(self) -> None:
        now_s = self._clock.monotonic_s()
        for request_id, move in list(self._planned.items()):
            if request_id not in self._tables.by_request or now_s > move.until_s:
                del self._planned[request_id]
                continue
            num_gone = self._evictor.evict(self._tables.request(request_id), move.num_rblocks, move.creditor)
            left = move.num_rblocks - num_gone
            self._planned[request_id] = move._replace(num_rblocks=left)
            if left <= 0:
                del self._planned[request_id]

    # ------------------------------------------------------------------ endings

    def release(self, request: Request) -> None:
        """Give back everything that a request holds, here and with creditors."""
        table = self._tables.leave(request)
        if table is not None:
            self._evictor.forget(request)
            self._allocator.free(table.local_block_ids())
            self._host.free(table.block_ids_under(HOST_LOAN))
        self._loans.end(RequestOwner(request.request_id))

    def enter(self, request: Request, table: BlockTable, handover_id: str) -> None:
        """A request comes from another instance, with its KV: the table's local rBlocks are allocated for it."""
        self._open_slots.rename(handover_id, request.request_id)
        self._tables.enter(request, table)

    def forget(self, request: Request, table: BlockTable, loan_ids: Collection[LoanId]) -> None:
        """What lay under these loans is gone, and will be computed again."""
        self._tables.lose(request, table, loan_ids)

    def lose_creditor(self, creditor: str) -> list[Request]:
        """Nothing that lay at this creditor is there any more; returns the requests whose KV must be computed again."""
        dropped = self._loans.drop(lambda loan: loan.creditor == creditor)
        return self._lose(dropped, self._fetch_back.arrived_from(creditor))

    def recall(self, key: LoanKey) -> None:
        """The creditor wants this loan back: its rBlocks are fetched back in the next steps."""
        self._fetch_back.recall(key)

    def note_step(self, step_s: float, throttled_s: Mapping[str, float]) -> None:
        """A step took `step_s` seconds, and waited so long for creditors with work of their own.

        One that it has been too much for lends nothing more, and what lies there comes back as far as there is room.
        """
        self._step_s = step_s if not self._step_s else 0.9 * self._step_s + 0.1 * step_s
        for creditor in self._backpressure.note(throttled_s, step_s):
            self._fetch_back.leave(creditor, self._evictor.num_spare)

    def ask_back_for(self, request: Request) -> None:
        """Recall as much as this request, one of this instance's own, lacks; nothing where that would not be enough.

        Whoever has what is lent computes with it, and has to begin anew without it: that must be good for something.
        """
        missing = self._tables.num_missing(request) - self.num_local_free
        lent, elsewhere = self._allocator.num_lent, self._host.num_free + self._candidates.borrowable_rblocks
        if missing <= lent + elsewhere:
            self._ask_back(min(lent, missing))

    def ask_back_all(self) -> None:
        """This instance is about to leave."""
        self._ask_back(self._allocator.num_lent)

    def check_integrity(self, incoming: Sequence[int] = (), handover_ids: Collection[str] = ()) -> None:
        """Between steps: tables in order, and every used rBlock in exactly one of them, or of a request to come."""
        self._evictor.check_integrity()
        tables = self._tables.by_request.values()
        for table in tables:
            table.check_integrity()
        self._allocator.check_integrity([*incoming, *(b for table in tables for b in table.local_block_ids())])
        self._open_slots.check_integrity([*self._tables.by_request, *handover_ids])
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
