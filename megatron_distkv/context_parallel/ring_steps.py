"""Which blocks of the attention matrix a rank has part in at each ring step, and what is sent for each: KV or Q.

Rank i's queries see only some of rank j's keys, and only some of them see any; nothing else is sent. For a token and a
training step, with elements of E bytes:

    pass-KV:  k, v there; k, v there again, dk, dv back                     6 K D E
    pass-Q:   q there, out back; q, out, d_out there, d_q back, lse twice   6 H D E + 8 H

so with fewer KV heads than query heads pass-KV is cheaper token for token, and where half of the queries see all keys
(the ranks before) pass-Q may be the cheaper one.
"""

from functools import lru_cache
from typing import NamedTuple, TypeAlias

import torch

from megatron_distkv.context_parallel.zigzag_layout import Segment, ZigzagLayout


class HeadSizes(NamedTuple):
    """What the bytes of a token depend on."""

    query_heads: int
    kv_heads: int
    head_dim: int
    element_bytes: int

    @property
    def query_bytes(self) -> int:
        return 6 * self.query_heads * self.head_dim * self.element_bytes + 8 * self.query_heads

    @property
    def kv_bytes(self) -> int:
        return 6 * self.kv_heads * self.head_dim * self.element_bytes


class Tile(NamedTuple):
    """Rows of a block's queries that see rows of its keys: all of them, or, being the same tokens, those before."""

    queries: slice
    keys: slice
    is_causal: bool


class Rows(NamedTuple):
    """Parts of a shard that a block takes."""

    parts: tuple[slice, ...]

    @property
    def num_rows(self) -> int:
        return sum(part.stop - part.start for part in self.parts)

    def take(self, x: torch.Tensor) -> torch.Tensor:
        return x[self.parts[0]] if len(self.parts) == 1 else torch.cat([x[part] for part in self.parts])

    def add(self, sums: torch.Tensor, x: torch.Tensor) -> None:
        """Add the block's rows to the shard's."""
        row = 0
        for part in self.parts:
            count = part.stop - part.start
            sums[part] += x[row : row + count]
            row += count


class RingBlock(NamedTuple):
    """Queries of one rank and the keys of another, or of its own, that they see: one rank sends, its peer computes."""

    query_rank: int
    kv_rank: int
    queries: Rows
    keys: Rows
    tiles: tuple[Tile, ...]
    pass_kv: bool

    @property
    def compute_rank(self) -> int:
        return self.query_rank if self.pass_kv else self.kv_rank

    @property
    def send_rank(self) -> int:
        return self.kv_rank if self.pass_kv else self.query_rank

    @property
    def is_local(self) -> bool:
        return self.query_rank == self.kv_rank


RingStep: TypeAlias = list[RingBlock]


@lru_cache(maxsize=1024)
def plan_block(layout: ZigzagLayout, query_rank: int, kv_rank: int, heads: HeadSizes) -> RingBlock | None:
    """None: no query of the one sees a key of the other."""
    of_document: dict[int, list[Segment]] = {}
    for theirs in layout.segments(kv_rank):
        of_document.setdefault(theirs.document, []).append(theirs)
    seen = [
        (mine, theirs)
        for mine in layout.segments(query_rank)
        for theirs in of_document.get(mine.document, [])
        if theirs.start <= mine.start
    ]
    if not seen:
        return None
    queries, keys = (sorted(set(side)) for side in zip(*seen, strict=True))
    query_rows, key_rows = _packed(queries), _packed(keys)
    tiles = tuple(Tile(query_rows[mine], key_rows[theirs], mine == theirs) for mine, theirs in seen)
    taken, given = (Rows(tuple(segment.rows for segment in side)) for side in (queries, keys))
    pass_kv = given.num_rows * heads.kv_bytes <= taken.num_rows * heads.query_bytes
    return RingBlock(query_rank, kv_rank, taken, given, tiles, pass_kv)


def _packed(segments: list[Segment]) -> dict[Segment, slice]:
    """Where each lies when only these are taken."""
    places, row = {}, 0
    for segment in segments:
        count = segment.stop - segment.start
        places[segment] = slice(row, row + count)
        row += count
    return places


def plan_ring_steps(layout: ZigzagLayout, cp_rank: int, heads: HeadSizes) -> list[RingStep]:
    """Step s: this rank's queries with the keys of the rank s before; those of the rank s after with this one's keys.

    Step 0 is local. Within a step all ranks have the same order, by which messages find each other.
    """
    steps = []
    for distance in range(layout.cp_size):
        before, after = (cp_rank - distance) % layout.cp_size, (cp_rank + distance) % layout.cp_size
        pairs = {(cp_rank, before), (after, cp_rank)}
        planned = [plan_block(layout, *pair, heads) for pair in sorted(pairs)]
        steps.append([block for block in planned if block is not None])
    return steps
