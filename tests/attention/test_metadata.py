"""A step's metadata is built from what the steps before have made, and is what it would be without them."""

import random
from typing import NamedTuple

from megatron_distkv.attention import KeptSpans, build_metadata
from megatron_distkv.kvcache.block_table import BlockTable
from megatron_distkv.rblock import InstanceId, LoanId, LocalSpan, Span, num_rblocks_for

N = 8


class Piece(NamedTuple):
    start: int
    end: int
    spans: list[Span]

    @property
    def local(self) -> dict[int, int]:
        """Physical ids by the number of the rBlock."""
        local = [x for x in self.spans if isinstance(x, LocalSpan)]
        return {x.first + place: block_id for x in local for place, block_id in enumerate(x.block_ids)}


def newest_tokens(table: BlockTable, rng: random.Random) -> Piece:
    """The last tokens that there is room for, or almost; the newest rBlocks are here."""
    end = table.num_rblocks * N - rng.randrange(N)
    num_new = rng.randrange(1, end - table.spans[-1].first * N + 1)
    return Piece(end - num_new, end, table.before(num_rblocks_for(end, N)))


def test_what_is_kept_changes_nothing() -> None:
    rng, kept = random.Random(3), KeptSpans(N)
    tables: dict[int, BlockTable] = {}
    for _ in range(300):
        # When a table begins or grows, its oldest rBlocks move out, another one ends
        table = tables.setdefault(rng.randrange(4), BlockTable())
        added = range(table.num_rblocks, table.num_rblocks + rng.randrange(1, 4))
        table.add_local(added, [rng.randrange(99) for _ in added])
        if rng.random() < 0.3 and table.num_local > 2:
            span = table.oldest_local(1, [range(table.num_rblocks)])[0]
            table.move_to_creditor(span.first, [rng.randrange(99)], InstanceId("b"), LoanId("a.1.0"))
        if rng.random() < 0.1 and len(tables) > 1:
            tables.popitem()
        pieces = [newest_tokens(some, rng) for some in tables.values()]
        metadata = build_metadata(pieces, N, kept=kept)

        # Then every index is what the tables say, one by one
        assert metadata.positions_T.tolist() == [t for x in pieces for t in range(x.start, x.end)]
        slots = [x.local[t // N] * N + t % N for x in pieces for t in range(x.start, x.end)]
        assert metadata.slot_mapping_T.tolist() == slots
        assert metadata.block_ids_M.tolist() == [block_id for x in pieces for block_id in x.local.values()]
        assert metadata.block_starts_M.tolist() == [number * N for x in pieces for number in x.local]
        assert metadata.cu_blocks.tolist() == [0, *_sums([len(x.local) for x in pieces])]
        assert metadata.cu_queries.tolist() == [0, *_sums([x.end - x.start for x in pieces])]


def _sums(counts: list[int]) -> list[int]:
    return [sum(counts[: place + 1]) for place in range(len(counts))]
