"""Who computes what of a step in fixed order: leaves here and in host memory, questions to creditors, merges of all.

Queries of one rBlock go together: they see the same rBlocks before it, and nobody computes what lies behind them.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from megatron_distkv.attention.fixed_order.leaves import MOST_PARTIALS, LeafList, Leaves
from megatron_distkv.attention.fixed_order.tree import Family, Merges, Node, cover, merge_up
from megatron_distkv.attention.metadata import SequenceSlice
from megatron_distkv.messages import QueryShare
from megatron_distkv.rblock import HOST, LocalSpan, Span

# Holders that no instance can be called: this rank's pool, and its rBlocks that are not in it yet (open_rblocks.py).
_HERE, _OPEN = "", "(open)"
# By rBlock, of each sequence: where the KV lies that this step writes, if it is not where full rBlocks do.
OpenPlaces = Sequence[Mapping[int, int]]


class Place(NamedTuple):
    """Where a leaf lies."""

    block_id: int
    loan_id: str


class Piece(NamedTuple):
    """Queries in one rBlock of a sequence: rows of the batch, the first one's position, and what they see."""

    rows: range
    first_position: int
    held: dict[str, dict[int, Place]]  # by holder and rBlock

    @property
    def num_leaves(self) -> int:
        return sum(len(leaves) for leaves in self.held.values())


class Question(NamedTuple):
    """To one creditor; the answer goes to `answer` of the buffer."""

    creditor: str
    part: int
    rows_R: torch.Tensor
    shares: list[QueryShare]
    answer: slice

    @property
    def num_partials(self) -> int:
        return int(self.answer.stop - self.answer.start)


class Block(NamedTuple):
    """Queries whose partials are held at one time; the buffer is | empty | here | open | host | answers | merges |."""

    here: Leaves
    open: Leaves
    host: Leaves
    questions: list[Question]
    asked: slice  # all answers
    merges: Merges
    rows: slice  # of the batch
    roots_T: torch.Tensor


def plan_blocks(
    slices: Sequence[SequenceSlice],
    rblock_size: int,
    window: int | None,
    most_answers: int,
    open_places: OpenPlaces | None = None,
) -> list[Block]:
    """For layers with such a window. No answer has more than `most_answers` partials."""
    parts: dict[str, int] = {}
    blocks = _blocks(slices, rblock_size, window, open_places)
    return [_Build(rblock_size, most_answers, parts).block(pieces) for pieces in blocks]


def _blocks(
    slices: Sequence[SequenceSlice], rblock_size: int, window: int | None, open_places: OpenPlaces | None
) -> Iterator[list[Piece]]:
    block: list[Piece] = []
    num_pairs = row = 0
    for number, some in enumerate(slices):
        held = _holders(some.spans)
        position = some.start
        while position < some.end:
            own = position // rblock_size
            room = (MOST_PARTIALS - num_pairs) // (own + 1)
            if room <= 0 and block:
                yield block
                block, num_pairs = [], 0
                continue
            count = min(some.end - position, (own + 1) * rblock_size - position, max(room, 1))
            piece = _piece(held, range(row, row + count), position, rblock_size, window)
            if open_places is not None:
                _open(piece, own, open_places[number][own])
            block.append(piece)
            num_pairs += piece.num_leaves * count
            position, row = position + count, row + count
    if block:
        yield block


def _open(piece: Piece, own: int, place: int) -> None:
    """Its own rBlock is seen as it was computed."""
    here = piece.held[_HERE]
    del here[own]
    if not here:
        del piece.held[_HERE]
    piece.held[_OPEN] = {own: Place(place, "")}


def _holders(spans: Sequence[Span]) -> dict[str, dict[int, Place]]:
    held: dict[str, dict[int, Place]] = {}
    for span in spans:
        holder, loan_id = (_HERE, "") if isinstance(span, LocalSpan) else (span.creditor, span.loan_id)
        places = held.setdefault(holder, {})
        places.update((index, Place(block_id, loan_id)) for index, block_id in enumerate(span.block_ids, span.first))
    return {holder: dict(sorted(places.items())) for holder, places in held.items()}


def _piece(
    held: dict[str, dict[int, Place]], rows: range, position: int, rblock_size: int, window: int | None
) -> Piece:
    first = 0 if window is None else max(0, position - window + 1) // rblock_size
    last = (position + len(rows) - 1) // rblock_size
    seen = {
        holder: {index: place for index, place in places.items() if first <= index <= last}
        for holder, places in held.items()
    }
    return Piece(rows, position, {holder: places for holder, places in seen.items() if places})


class _Build:
    def __init__(self, rblock_size: int, most_answers: int, parts: dict[str, int]) -> None:
        self._rblock_size = rblock_size
        self._most_answers = most_answers
        self._parts = parts  # questions so far, by creditor

    def block(self, pieces: list[Piece]) -> Block:
        families = [Family({}, len(piece.rows)) for piece in pieces]
        here = self._own(pieces, families, _HERE, 1)
        opened = self._own(pieces, families, _OPEN, here.place.stop)
        host = self._own(pieces, families, HOST, opened.place.stop)
        begin = end = host.place.stop
        questions = []
        for creditor in sorted({name for piece in pieces for name in piece.held} - {_HERE, _OPEN, HOST}):
            for asked in self._packed(pieces, creditor):
                questions.append(self._question(creditor, asked, pieces, families, end))
                end = questions[-1].answer.stop
        merges = merge_up(families, end, to_cover=False)
        rows = slice(pieces[0].rows.start, pieces[-1].rows.stop)
        roots = [row for family in families for row in _rows_of_root(family)]
        return Block(here, opened, host, questions, slice(begin, end), merges, rows, torch.tensor(roots))

    def _own(self, pieces: list[Piece], families: list[Family], holder: str, begin: int) -> Leaves:
        todo = LeafList(begin)
        for piece, family in zip(pieces, families, strict=True):
            if places := piece.held.get(holder):
                starts = [index * self._rblock_size for index in places]
                block_ids = [place.block_id for place in places.values()]
                begins = todo.add(piece.rows, piece.first_position, block_ids, starts)
                family.places.update((Node(0, index), at) for index, at in zip(places, begins, strict=True))
        return todo.leaves()

    def _packed(self, pieces: list[Piece], creditor: str) -> Iterator[list[tuple[int, list[Node]]]]:
        """Which nodes of which pieces go into one question."""
        packed: list[tuple[int, list[Node]]] = []
        room = self._most_answers
        for number, piece in enumerate(pieces):
            nodes = cover(piece.held.get(creditor, {}))
            while nodes:
                count = room // len(piece.rows)
                if count == 0 and packed:
                    yield packed
                    packed, room = [], self._most_answers
                    continue
                some, nodes = nodes[: max(count, 1)], nodes[max(count, 1) :]
                packed.append((number, some))
                room -= len(some) * len(piece.rows)
        if packed:
            yield packed

    def _question(
        self,
        creditor: str,
        asked: list[tuple[int, list[Node]]],
        pieces: list[Piece],
        families: list[Family],
        end: int,
    ) -> Question:
        begin = end
        shares: list[QueryShare] = []
        rows: list[int] = []
        for number, nodes in asked:
            piece, family = pieces[number], families[number]
            shares.append(self._share(piece, creditor, nodes))
            rows.extend(piece.rows)
            for node in nodes:
                family.places[node] = end
                end += family.num_rows
        part = self._parts[creditor] = self._parts.get(creditor, -1) + 1
        return Question(creditor, part, torch.tensor(rows), shares, slice(begin, end))

    def _share(self, piece: Piece, creditor: str, nodes: list[Node]) -> QueryShare:
        held = piece.held[creditor]
        leaves = [leaf for node in nodes for leaf in node.leaves]
        loans = sorted({held[leaf].loan_id for leaf in leaves})
        starts = [leaf * self._rblock_size for leaf in leaves]
        block_ids = [held[leaf].block_id for leaf in leaves]
        return QueryShare(loans, block_ids, len(piece.rows), starts, piece.first_position)


def _rows_of_root(family: Family) -> range:
    (begin,) = family.places.values()  # at least the rBlock of the tokens themselves is there
    return range(begin, begin + family.num_rows)
