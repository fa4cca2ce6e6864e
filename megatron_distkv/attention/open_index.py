"""What all layers of one step need to know of a pool in int8: where its new tokens go, and what they see of it.

Built once per step (attention/open_rblocks.py says for what); a list of a thousand rBlocks costs no loop in Python.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from megatron_distkv.attention.metadata import SequenceSlice
from megatron_distkv.attention.span_tensors import KeptSpans, SpanTensors
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
    past: SpanTensors  # the request's full rBlocks here before it


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


def open_index(slices: Sequence[OpenSlice], size: int, kept: KeptSpans | None = None) -> OpenIndex:
    """For rBlocks of `size` tokens. `kept`: what the steps before have made of the same spans.

    Raises IntegrityError when a new token has no local rBlock, or no slot.
    """
    kept = kept or KeptSpans(size)
    kept.begin_step()
    of_slices = [_writing(piece, size, kept) for piece in slices]
    writing = [x for of_slice in of_slices for x in of_slice]
    in_slots = len(writing) == len(slices)
    placed = [(x.open_slot if in_slots else number, x) for number, x in enumerate(writing)]
    places = (place for place, _ in placed)
    own_places, own_starts = _pairs([(place, x.rblock * size) for place, x in placed])
    return OpenIndex(
        in_slots,
        [{x.rblock: next(places) for x in of_slice} for of_slice in of_slices],
        _int64([place * size + t % size for place, x in placed for t in range(x.start, x.end)]),
        _ends([x.end - x.start for x in writing]),
        RBlockLists(own_places, own_starts, torch.arange(len(writing) + 1)),
        _lists([x.past for x in writing]),
        _pairs([(place, x.block_id) for place, x in placed if x.end == (x.rblock + 1) * size]),
        _pairs([(place, x.open_slot) for place, x in placed if x.start % size]),
        _pairs([(place, x.open_slot) for place, x in placed if x.end % size]),
    )


def _writing(piece: OpenSlice, size: int, kept: KeptSpans) -> list[_Writing]:
    local = [span for span in piece.spans if isinstance(span, LocalSpan)]
    rblocks = range(piece.start // size, num_rblocks_for(piece.end, size))
    written = [x for span in local for x in _within(span, rblocks)]
    if piece.open_slot is None or len(written) < len(rblocks):
        raise IntegrityError(f"the tokens at positions {piece.start}..{piece.end} have no local rBlock, or no slot")
    num_before = sum(min(len(span.block_ids), max(0, rblocks.start - span.first)) for span in local)
    tensors = [kept.of(span) for span in local]
    block_ids, starts = (torch.cat(parts) for parts in zip(*tensors, strict=True))
    return [
        _Writing(
            rblock,
            block_id,
            max(piece.start, rblock * size),
            min(piece.end, (rblock + 1) * size),
            piece.open_slot,
            SpanTensors(block_ids[:num_past], starts[:num_past]),
        )
        for num_past, (rblock, block_id) in enumerate(zip(rblocks, written, strict=True), start=num_before)
    ]


def _within(span: LocalSpan, rblocks: range) -> tuple[int, ...]:
    """Physical ids of those of its rBlocks."""
    return span.block_ids[max(0, rblocks.start - span.first) : max(0, rblocks.stop - span.first)]


def _lists(lists: Sequence[SpanTensors]) -> RBlockLists:
    none = _int64([])
    return RBlockLists(
        torch.cat([none, *(x.block_ids for x in lists)]),
        torch.cat([none, *(x.block_starts for x in lists)]),
        _ends([len(x.block_ids) for x in lists]),
    )


def _pairs(pairs: Sequence[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    return _int64([left for left, _ in pairs]), _int64([right for _, right in pairs])


def _ends(counts: Sequence[int]) -> torch.Tensor:
    """0 and where each of them ends."""
    return _int64([0, *counts]).cumsum(0)


def _int64(values: Sequence[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)
