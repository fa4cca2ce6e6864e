"""One order of merging for all placements: a tree over a request's rBlocks, fixed by their positions alone.

    rBlocks    0 1 2 3 4 5 6 7   8 9 10          leaves: each rBlock's partial is computed on its own, where it lies
    level 1          0              1            every FAN_IN neighbours are merged into their parent, first to last
    level 2                 0                    ... until one is left

An empty partial changes no bit of a merge, and a single child is its parent, so keys that a query does not see need no
leaf. A holder may merge a node itself where it has all its leaves: it is the same merge, and less travels.
"""

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import NamedTuple

import torch

FAN_IN = 8


class Node(NamedTuple):
    """Level 0: rBlock `number` of the request."""

    level: int
    number: int

    @property
    def parent(self) -> "Node":
        return Node(self.level + 1, self.number // FAN_IN)

    @property
    def leaves(self) -> range:
        width: int = FAN_IN**self.level
        return range(self.number * width, (self.number + 1) * width)


# Where each node's partials begin in a buffer: one row per query, one after the other.
Places = dict[Node, int]


class Family(NamedTuple):
    """The nodes of one sequence, whose `num_rows` queries share them."""

    places: Places
    num_rows: int


class Merges(NamedTuple):
    """Level by level `[FAN_IN, m]`: rows of the buffer to merge; the m results are appended to it. Row 0 is empty."""

    levels: list[torch.Tensor]
    num_rows: int  # of the buffer in the end


def cover(leaves: Iterable[int]) -> list[Node]:
    """The largest whole nodes over these leaves, in their order: what a holder of exactly these answers with."""
    kept: list[Node] = []
    nodes = {Node(0, leaf) for leaf in leaves}
    while nodes:
        whole = {parent for parent in {node.parent for node in nodes} if _children(parent) <= nodes}
        kept += [node for node in nodes if node.parent not in whole]
        nodes = whole
    return sorted(kept, key=lambda node: node.leaves.start)


def _children(parent: Node) -> set[Node]:
    return {Node(parent.level - 1, parent.number * FAN_IN + child) for child in range(FAN_IN)}


def merge_up(families: Sequence[Family], num_rows: int, *, to_cover: bool) -> Merges:
    """The merges to each family's one root (or, `to_cover`, to the nodes of `cover`) from a buffer of `num_rows`.

    The families' places are brought up to date.
    """
    levels: list[torch.Tensor] = []
    level = 0
    while any(_has_merges_from(family, level) for family in families):
        merges = _Level()
        for family in families:
            if _has_merges_from(family, level):
                num_rows = _merge_level(family, level, num_rows, merges, to_cover=to_cover)
        if merges.begins:
            levels.append(merges.rows())
        level += 1
    return Merges(levels, num_rows)


class _Level:
    """Merges of one level in the making: where the rows of each parent's children begin, and how many rows they are."""

    def __init__(self) -> None:
        self.begins: list[list[int]] = []
        self.counts: list[int] = []

    def add(self, children: list[int], num_rows: int) -> None:
        self.begins.append(children + [-1] * (FAN_IN - len(children)))
        self.counts.append(num_rows)

    def rows(self) -> torch.Tensor:
        """`[FAN_IN, m]`; a child that is not there is the empty row."""
        begins_FP, counts_P = torch.tensor(self.begins).T, torch.tensor(self.counts)
        begins_Fm = begins_FP.repeat_interleave(counts_P, 1)
        firsts_m = (counts_P.cumsum(0) - counts_P).repeat_interleave(counts_P)
        rows_Fm = begins_Fm + (torch.arange(begins_Fm.shape[1]) - firsts_m)
        return rows_Fm.masked_fill_(begins_Fm < 0, 0)


def _has_merges_from(family: Family, level: int) -> bool:
    return len(family.places) > 1 and any(node.level >= level for node in family.places)


def _merge_level(family: Family, level: int, end: int, merges: _Level, *, to_cover: bool) -> int:
    """Where a buffer then ends that ended at `end`."""
    places = family.places
    nodes = sorted(node for node in places if node.level == level)
    for number, group in groupby(nodes, key=lambda node: node.number // FAN_IN):
        parent, children = Node(level + 1, number), list(group)
        if to_cover and len(children) < FAN_IN:
            continue
        begins = [places.pop(child) for child in children]
        if len(begins) == 1:
            places[parent] = begins[0]
            continue
        places[parent] = end
        merges.add(begins, family.num_rows)
        end += family.num_rows
    return end
