"""What two ranks of a context group have to do with each other, and which of them travels: queries or keys.

Rank i's queries see only some of rank j's keys, and only some of them see any; nothing else travels. For a token and a
training step, with elements of E bytes:

    keys:     k, v there; k, v there again, dk, dv back                     6 K D E
    queries:  q there, out back; q, out, d_out there, d_q back, lse twice   6 H D E + 8 H

so with fewer KV heads than query heads keys are cheaper token for token, and where half of the queries see all keys
(the ranks before) the queries may be the cheaper half.
"""

from functools import lru_cache
from typing import NamedTuple

import torch

from megatron_distkv.attention.shard_order import Segment, ShardOrder


class Heads(NamedTuple):
    """What the bytes of a token depend on."""

    query_heads: int
    kv_heads: int
    head_dim: int
    element_bytes: int

    @property
    def query_bytes(self) -> int:
        return 6 * self.query_heads * self.head_dim * self.element_bytes + 8 * self.query_heads

    @property
    def key_bytes(self) -> int:
        return 6 * self.kv_heads * self.head_dim * self.element_bytes


class Tile(NamedTuple):
    """Rows of a visit's queries that see rows of its keys: all of them, or, being the same tokens, those before."""

    queries: slice
    keys: slice
    is_causal: bool


class Rows(NamedTuple):
    """Parts of a shard that a visit takes."""

    parts: tuple[slice, ...]

    @property
    def num_rows(self) -> int:
        return sum(part.stop - part.start for part in self.parts)

    def take(self, x: torch.Tensor) -> torch.Tensor:
        return x[self.parts[0]] if len(self.parts) == 1 else torch.cat([x[part] for part in self.parts])

    def add(self, sums: torch.Tensor, x: torch.Tensor) -> None:
        """Add the visit's rows to the shard's."""
        row = 0
        for part in self.parts:
            count = part.stop - part.start
            sums[part] += x[row : row + count]
            row += count


class Visit(NamedTuple):
    query_rank: int
    key_rank: int
    queries: Rows
    keys: Rows
    tiles: tuple[Tile, ...]
    keys_travel: bool

    @property
    def host(self) -> int:
        """The rank that computes."""
        return self.query_rank if self.keys_travel else self.key_rank

    @property
    def guest(self) -> int:
        return self.key_rank if self.keys_travel else self.query_rank


@lru_cache(maxsize=1024)
def plan_visit(order: ShardOrder, query_rank: int, key_rank: int, heads: Heads) -> Visit | None:
    """None: no query of the one sees a key of the other."""
    of_document: dict[int, list[Segment]] = {}
    for theirs in order.segments(key_rank):
        of_document.setdefault(theirs.document, []).append(theirs)
    seen = [
        (mine, theirs)
        for mine in order.segments(query_rank)
        for theirs in of_document.get(mine.document, [])
        if theirs.start <= mine.start
    ]
    if not seen:
        return None
    queries, keys = (sorted(set(side)) for side in zip(*seen, strict=True))
    query_rows, key_rows = _packed(queries), _packed(keys)
    tiles = tuple(Tile(query_rows[mine], key_rows[theirs], mine == theirs) for mine, theirs in seen)
    taken, given = (Rows(tuple(segment.rows for segment in side)) for side in (queries, keys))
    keys_travel = given.num_rows * heads.key_bytes <= taken.num_rows * heads.query_bytes
    return Visit(query_rank, key_rank, taken, given, tiles, keys_travel)


def _packed(segments: list[Segment]) -> dict[Segment, slice]:
    """Where each lies when only these are taken."""
    places, row = {}, 0
    for segment in segments:
        count = segment.stop - segment.start
        places[segment] = slice(row, row + count)
        row += count
    return places


def plan_rounds(order: ShardOrder, rank: int, heads: Heads) -> list[list[Visit]]:
    """Round s: this rank's queries with the keys of the rank s before; those of the rank s after with this one's keys.

    Round 0 is at home. Within a round all ranks have the same order, by which messages find each other.
    """
    rounds = []
    for step in range(order.size):
        pairs = {(rank, (rank - step) % order.size), ((rank + step) % order.size, rank)}
        planned = [plan_visit(order, *pair, heads) for pair in sorted(pairs)]
        rounds.append([visit for visit in planned if visit is not None])
    return rounds
