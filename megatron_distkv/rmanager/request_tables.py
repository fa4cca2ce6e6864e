"""Running requests with their block tables: where their KV lies, and how much more memory they will take."""

from collections.abc import Collection, Sequence

from megatron_distkv.kvcache.block_table import BlockTable
from megatron_distkv.kvcache.open_slots import OpenSlots
from megatron_distkv.rblock import LoanId, num_rblocks_for
from megatron_distkv.request import Request


class RequestTables:
    """`open_slots`: where rBlocks that are not full yet lie, if not where their tables say."""

    def __init__(self, rblock_size: int, open_slots: OpenSlots) -> None:
        self._open_slots = open_slots
        self.by_request: dict[str, BlockTable] = {}
        self._requests: dict[str, Request] = {}
        self._rblock_size = rblock_size

    def of(self, request_id: str) -> BlockTable:
        return self.by_request[request_id]

    def request(self, request_id: str) -> Request:
        return self._requests[request_id]

    def enter(self, request: Request, table: BlockTable | None = None) -> BlockTable:
        """Its table: the one that it brings along, the one that it has, or an empty one."""
        self._requests[request.request_id] = request
        self._open_slots.take(request.request_id)
        if table is not None:
            self.by_request[request.request_id] = table
        return self.by_request.setdefault(request.request_id, BlockTable())

    def leave(self, request: Request) -> BlockTable | None:
        self._requests.pop(request.request_id, None)
        self._open_slots.give_back(request.request_id)
        return self.by_request.pop(request.request_id, None)

    def longest_first(self) -> list[Request]:
        return sorted(self._requests.values(), key=lambda request: request.num_computed_tokens, reverse=True)

    # ------------------------------------------------------------------ KV

    def full_rblocks(self, request: Request) -> list[range]:
        """rBlocks all of whose positions have their KV: only they may leave."""
        size = self._rblock_size
        return [range(num_rblocks_for(have.start, size), have.stop // size) for have in request.computed_ranges()]

    def movable_ranges(self, request: Request) -> list[range]:
        """Positions whose KV could go to another instance: all that are computed, less those in open slots."""
        if not self._open_slots.are_needed:
            return request.computed_ranges()
        size = self._rblock_size
        return [range(x.start * size, x.stop * size) for x in self.full_rblocks(request) if x]

    def _open_ranges(self, request: Request) -> list[range]:
        """What is lost with any other loss: a step that fails may have written over it in its slot."""
        if not self._open_slots.are_needed:
            return []
        size = self._rblock_size
        return [range(max(x.start, x.stop // size * size), x.stop) for x in request.computed_ranges()]

    def lose(
        self, request: Request, table: BlockTable, loan_ids: Collection[LoanId], rblocks: Sequence[range] = ()
    ) -> None:
        """What lay under these loans is gone, and these rBlocks hold nothing: all that will be computed again."""
        spans = table.remove_loans(loan_ids)
        lost = [*(range(span.first, span.first + len(span.block_ids)) for span in spans), *rblocks]
        size = self._rblock_size
        request.lose(*(range(x.start * size, x.stop * size) for x in lost), *self._open_ranges(request))

    # ------------------------------------------------------------------ growth

    def growth_until_the_end(self) -> int:
        """rBlocks that all of them will still take."""
        return sum(self._growth(request, request.max_total_tokens) for request in self._requests.values())

    def growth_within(self, num_tokens: int) -> int:
        """rBlocks that all of them will take for the tokens that they have, and `num_tokens` more each."""
        return sum(self._growth(request, request.num_tokens + num_tokens) for request in self._requests.values())

    def longest_end(self) -> int:
        """rBlocks that the longest of them may take in the end, wherever they lie."""
        ends = (num_rblocks_for(x.max_total_tokens, self._rblock_size) for x in self._requests.values())
        return max(ends, default=0)

    def num_movable_in_the_end(self, request: Request) -> int:
        """rBlocks of its own instance's that it could give away before it ends: all but the newest."""
        table, end = self.by_request[request.request_id], num_rblocks_for(request.max_total_tokens, self._rblock_size)
        return max(0, end - 1 - (table.num_rblocks - table.num_local))

    def num_missing(self, request: Request) -> int:
        """rBlocks that this request's tokens and one more take, with what running requests still need."""
        others = sum(self._growth(x, x.num_tokens + 1) for x in self._requests.values() if x is not request)
        return self._growth(request, request.num_tokens + 1) + others

    def _growth(self, request: Request, num_tokens: int) -> int:
        num_tokens = min(num_tokens, request.max_total_tokens)  # nobody needs the last token's KV
        table = self.by_request.get(request.request_id)
        return max(0, num_rblocks_for(num_tokens, self._rblock_size) - (table.num_rblocks if table else 0))
