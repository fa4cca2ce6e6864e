"""Room in the pool for running requests: what is free there, and more where their oldest rBlocks move out."""

from megatron_distkv.request import Request
from megatron_distkv.rmanager.outgoing import Outgoing
from megatron_distkv.rmanager.request_tables import RequestTables


class Room:
    """`watermark`: as many rBlocks should be free."""

    def __init__(self, outgoing: Outgoing, tables: RequestTables, watermark: int) -> None:
        self._outgoing = outgoing
        self._tables = tables
        self._watermark = watermark

    @property
    def num_free(self) -> int:
        return self._outgoing.num_free

    @property
    def num_spare(self) -> int:
        """Free beyond the watermark; negative below it."""
        return self.num_free - self._watermark

    @property
    def moves_left(self) -> int:
        """rBlocks that this step may still move, in either direction."""
        return self._outgoing.moves_left

    def take(self, count: int) -> list[int]:
        """Up to `count` free rBlocks."""
        return self._outgoing.take_free(count)

    def make_for(self, count: int) -> None:
        """Until `count` rBlocks are free, or no more may move: the oldest full ones of the longest request first."""
        missing = min(count - self.num_free, self.moves_left)
        if missing <= 0:
            return
        for request in self._tables.longest_first():
            missing -= self.move_oldest(request, missing)
            if missing <= 0:
                return

    def make_ahead(self) -> None:
        """Below the watermark, and where running requests will still grow, before there is need."""
        self.make_for(min(self._watermark, self._tables.growth_until_the_end()))

    def move_oldest(self, request: Request, count: int, only_to: str | None = None) -> int:
        """Move up to `count` of the request's oldest full rBlocks out; returns how many go."""
        table, full = self._tables.of(request.request_id), self._tables.full_rblocks(request)
        return self._outgoing.move_oldest(request, table, full, min(count, self.moves_left), only_to)
