"""What all layers of one step need to know of a pool in int8: where its new tokens go, and what they see of it.

Built once per step (attention/open_rblocks.py says for what); a list of a thousand rBlocks costs no loop in Python.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from megatron_distkv.attention.metadata import SequenceSlice
from megatron_distkv.errors import IntegrityError
from megatron_distkv.rblock import LocalSpan, num_rblocks_for


class OpenSlice(SequenceSlice, Protocol):
    @property
    def open_slot(self) -> int | None:
        """Where the tokens of the rBlock that `start` lies in are, those before `start`."""
        ...


class _Writing(NamedTuple):
    """An rBlock that a step writes the KV of positions `[start, end)` to; physical id `block_id` once it is full."""

    rblock: int
    block_id: int
    start: int
    end: int
    open_slot: int
    past: tuple[list[int], list[int]]  # numbers and physical ids of the request's full rBlocks here before it


class RBlockLists(NamedTuple):
    """Of rBlocks, a list for each that is written to (int64; contract: ops.micro_attention)."""

    block_ids_M: torch.Tensor
    block_starts_M: torch.Tensor
    cu_blocks: torch.Tensor


@dataclass(frozen=True)
class OpenIndex:
    """Places are indices into the scratch, or (`in_slots`) open slots."""

    in_slots: bool
    places: list[dict[int, int]]  # of each slice: where each rBlock is that it writes to
    places_T: torch.Tensor  # where each new token's KV goes: place * N + offset
    cu_queries: torch.Tensor
    own: RBlockLists
    past: RBlockLists
    filled: tuple[torch.Tensor, torch.Tensor]  # places that are full after this step, and their physical ids
    begun: tuple[torch.Tensor, torch.Tensor]  # places, and the open slots that hold their tokens before this step
    left_open: tuple[torch.Tensor, torch.Tensor]  # places, and the open slots that shall hold them


def open_index(slices: Sequence[OpenSlice], size: int) -> OpenIndex:
    """For rBlocks of `size` tokens. Raises IntegrityError when a new token has no local rBlock, or no slot."""
    of_slices = [_writing(piece, size) for piece in slices]
    writing = [x for of_slice in of_slices for x in of_slice]
    in_slots = len(writing) == len(slices)
    placed = [(x.open_slot if in_slots else number, x) for number, x in enumerate(writing)]
    places = (place for place, _ in placed)
    return OpenIndex(
        in_slots,
        [{x.rblock: next(places) for x in of_slice} for of_slice in of_slices],
        _int64([place * size + t % size for place, x in placed for t in range(x.start, x.end)]),
        _ends([x.end - x.start for x in writing]),
        _lists([([x.rblock], [place]) for place, x in placed], size),
        _lists([x.past for x in writing], size),
        _pairs([(place, x.block_id) for place, x in placed if x.end == (x.rblock + 1) * size]),
        _pairs([(place, x.open_slot) for place, x in placed if x.start % size]),
        _pairs([(place, x.open_slot) for place, x in placed if x.end % size]),
    )


def _writing(piece: OpenSlice, size: int) -> list[_Writing]:
    numbers: list[int] = []  # of the local rBlocks, ascending
    block_ids: list[int] = []
    for span in piece.spans:
        if isinstance(span, LocalSpan):
            numbers.extend(range(span.first, span.first + len(span.block_ids)))
            block_ids.extend(span.block_ids)
    rblocks = range(piece.start // size, num_rblocks_for(piece.end, size))
    first = bisect_left(numbers, rblocks.start)
    if piece.open_slot is None or numbers[first : first + len(rblocks)] != list(rblocks):
        raise IntegrityError(f"the tokens at positions {piece.start}..{piece.end} have no local rBlock, or no slot")
    return [
        _Writing(
            rblock,
            block_ids[num_before],
            max(piece.start, rblock * size),
            min(piece.end, (rblock + 1) * size),
            piece.open_slot,
            (numbers[:num_before], block_ids[:num_before]),
        )
        for num_before, rblock in enumerate(rblocks, start=first)
    ]


def _lists(lists: Sequence[tuple[list[int], list[int]]], size: int) -> RBlockLists:
    """From numbers and physical ids."""
    flat_numbers: list[int] = []
    flat_ids: list[int] = []
    for numbers, block_ids in lists:
        flat_numbers += numbers
        flat_ids += block_ids
    return RBlockLists(_int64(flat_ids), _int64(flat_numbers).mul_(size), _ends([len(ids) for _, ids in lists]))


def _pairs(pairs: Sequence[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    return _int64([left for left, _ in pairs]), _int64([right for _, right in pairs])


def _ends(counts: Sequence[int]) -> torch.Tensor:
    """0 and where each of them ends."""
    return _int64([0, *counts]).cumsum(0)


def _int64(values: Sequence[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)
