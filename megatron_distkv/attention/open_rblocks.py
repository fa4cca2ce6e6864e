"""A pool in int8 and what is not in it yet: rBlocks that still get tokens stay in the model's dtype, and are merged.

    a request's local keys = | int8: full rBlocks | its open slot: the rBlock that is not full yet |

**A query sees its own rBlock as it was computed, and all rBlocks before that one in int8**, in whatever step they
became full. So what a token sees depends neither on how a prompt was cut into steps, nor on whether KV was lost and
computed again, nor on where it lies. A step that writes into several rBlocks of a request gathers them, layer by layer,
in a scratch of one layer; one that does not (decoding) works in the slots themselves.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from megatron_distkv.attention.metadata import SequenceSlice
from megatron_distkv.attention.rotary import RotaryTable
from megatron_distkv.errors import IntegrityError
from megatron_distkv.messages import Scoring
from megatron_distkv.ops import merge, micro_attention, micro_attention_int8, pack_rblocks, store_kv, unpack_rblocks
from megatron_distkv.rblock import LocalSpan, num_rblocks_for


class OpenSlice(SequenceSlice, Protocol):
    @property
    def open_slot(self) -> int | None:
        """Where the tokens of the rBlock that `start` lies in are, those before `start`."""
        ...


class NewKeys(NamedTuple):
    """K and V of a step's new tokens, `[T, K, D]`; K is to be turned by these angles, if there are any."""

    k_TKD: torch.Tensor
    v_TKD: torch.Tensor
    angles: RotaryTable | tuple[()] = ()


class _Writing(NamedTuple):
    """An rBlock that a step writes the KV of positions `[start, end)` to; physical id `block_id` once it is full."""

    rblock: int
    block_id: int
    start: int
    end: int
    open_slot: int
    past: list[tuple[int, int]]  # number and physical id of the request's full rBlocks here before it


class _Lists(NamedTuple):
    """Of rBlocks, a list for each that is written to (int64; contract: ops.micro_attention)."""

    block_ids_M: torch.Tensor
    block_starts_M: torch.Tensor
    cu_blocks: torch.Tensor


@dataclass(frozen=True)
class _Index:
    """Of one step, used by all its layers. Places are indices into the scratch, or (`in_slots`) open slots."""

    in_slots: bool
    places: list[int]  # of the rBlocks that are written to
    places_T: torch.Tensor  # where each new token's KV goes: place * N + offset
    cu_queries: torch.Tensor
    own: _Lists
    past: _Lists
    filled: tuple[torch.Tensor, torch.Tensor]  # places that are full after this step, and their physical ids
    begun: tuple[torch.Tensor, torch.Tensor]  # places, and the open slots that hold their tokens before this step
    left_open: tuple[torch.Tensor, torch.Tensor]  # places, and the open slots that shall hold them


class OpenRBlocks:
    """`begin_step`, then `attend` in each layer."""

    def __init__(self, pool_BLKX: torch.Tensor, slots_OLK2ND: torch.Tensor) -> None:
        """`pool_BLKX`: packed (ops.int8_kv). `slots_OLK2ND`: a place for each request's open rBlock."""
        self._pool = pool_BLKX
        self.full = unpack_rblocks(pool_BLKX, slots_OLK2ND.shape[-1])
        self._slots = slots_OLK2ND
        self._scratch = slots_OLK2ND.new_zeros((0, 1, *slots_OLK2ND.shape[2:]))
        self._index: _Index | None = None
        # Of each slice of the step: where `store` has each rBlock that is written to.
        self.places: list[dict[int, int]] = []

    def begin_step(self, slices: Sequence[OpenSlice]) -> None:
        """Raises IntegrityError when a new token has no local rBlock, or no slot."""
        rblock_size = self._slots.shape[4]
        writing = [x for piece in slices for x in _writing(piece, rblock_size)]
        self._index = _index(writing, rblock_size, in_slots=len(writing) == len(slices))
        places = iter(self._index.places)
        self.places = [{rblock: next(places) for rblock in _rblocks(piece, rblock_size)} for piece in slices]
        if not self._index.in_slots and len(writing) > len(self._scratch):
            self._scratch = self._slots.new_zeros((len(writing), 1, *self._slots.shape[2:]))

    def attend(
        self,
        layer: int,
        q_THD: torch.Tensor,
        new: NewKeys,
        positions_T: torch.Tensor,
        scale: float,
        scoring: Scoring,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the new tokens; out `[T, H, D]` and lse `[T, H]`, fp32, over all local keys."""
        index = self._index
        assert index is not None
        written, of_layer = self.store(layer, new)
        rows = index.cu_queries, positions_T, scale
        limits = scoring.window, scoring.soft_cap
        own_out, own_lse = micro_attention(q_THD, written, of_layer, *index.own, *rows, True, *limits)
        if not len(index.past.block_ids_M):
            return own_out, own_lse
        kv, k_scales, v_scales = self.full
        out, lse = micro_attention_int8(q_THD, kv, k_scales, v_scales, layer, *index.past, *rows, False, *limits)
        return merge(torch.stack([own_out, out]), torch.stack([own_lse, lse]))

    def store(self, layer: int, new: NewKeys) -> tuple[torch.Tensor, int]:
        """What is written to, as computed, and which of its layers. Full rBlocks are in the pool, too."""
        index = self._index
        assert index is not None
        written, of_layer = (self._slots, layer) if index.in_slots else (self._scratch, 0)
        if not index.in_slots:
            written[index.begun[0], 0] = self._slots[index.begun[1], layer]
        store_kv(new.k_TKD, new.v_TKD, written, of_layer, index.places_T, *new.angles)
        places, block_ids = index.filled
        if len(places):
            self._pool[block_ids, layer] = pack_rblocks(written[places, of_layer].unsqueeze(1))[:, 0]
        if not index.in_slots:
            self._slots[index.left_open[1], layer] = written[index.left_open[0], 0]
        return written, of_layer


def _writing(piece: OpenSlice, rblock_size: int) -> list[_Writing]:
    local = {
        rblock: block_id
        for span in piece.spans
        if isinstance(span, LocalSpan)
        for rblock, block_id in enumerate(span.block_ids, start=span.first)
    }
    rblocks = _rblocks(piece, rblock_size)
    if piece.open_slot is None or not local.keys() >= set(rblocks):
        raise IntegrityError(f"the tokens at positions {piece.start}..{piece.end} have no local rBlock, or no slot")
    return [
        _Writing(
            rblock,
            local[rblock],
            max(piece.start, rblock * rblock_size),
            min(piece.end, (rblock + 1) * rblock_size),
            piece.open_slot,
            [(number, block_id) for number, block_id in sorted(local.items()) if number < rblock],
        )
        for rblock in rblocks
    ]


def _rblocks(piece: OpenSlice, rblock_size: int) -> range:
    """Those that it writes to."""
    return range(piece.start // rblock_size, num_rblocks_for(piece.end, rblock_size))


def _index(writing: Sequence[_Writing], size: int, *, in_slots: bool) -> _Index:
    places = [x.open_slot if in_slots else place for place, x in enumerate(writing)]
    full = [(place, x.block_id) for place, x in zip(places, writing, strict=True) if x.end == (x.rblock + 1) * size]
    begun = [(place, x.open_slot) for place, x in zip(places, writing, strict=True) if x.start % size]
    left_open = [(place, x.open_slot) for place, x in zip(places, writing, strict=True) if x.end % size]
    tokens = [place * size + t % size for place, x in zip(places, writing, strict=True) for t in range(x.start, x.end)]
    return _Index(
        in_slots,
        places,
        _int64(tokens),
        _ends([x.end - x.start for x in writing]),
        _lists([[(x.rblock, place)] for place, x in zip(places, writing, strict=True)], size),
        _lists([x.past for x in writing], size),
        _pairs(full),
        _pairs(begun),
        _pairs(left_open),
    )


def _lists(lists: Sequence[Sequence[tuple[int, int]]], rblock_size: int) -> _Lists:
    """From numbers and physical ids."""
    flat = [pair for each in lists for pair in each]
    starts = [rblock * rblock_size for rblock, _ in flat]
    return _Lists(_int64([block_id for _, block_id in flat]), _int64(starts), _ends([len(each) for each in lists]))


def _pairs(pairs: Sequence[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    return _int64([left for left, _ in pairs]), _int64([right for _, right in pairs])


def _ends(counts: Sequence[int]) -> torch.Tensor:
    """0 and where each of them ends."""
    return torch.tensor([0, *counts], dtype=torch.int64).cumsum(0)


def _int64(values: Sequence[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)
