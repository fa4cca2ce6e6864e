"""A pool in int8 and what is not in it yet: rBlocks that still get tokens stay in the model's dtype, and are merged.

    a request's local keys = | int8: full rBlocks | its open slot: the rBlock that is not full yet |

**A query sees its own rBlock as it was computed, and all rBlocks before that one in int8**, in whatever step they
became full. So what a token sees depends neither on how a prompt was cut into steps, nor on whether KV was lost and
computed again, nor on where it lies. A step that writes into several rBlocks of a request gathers them, layer by layer,
in a scratch of one layer; one that does not (decoding) works in the slots themselves.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from megatron_distkv.attention.open_index import OpenIndex, OpenSlice, open_index
from megatron_distkv.attention.rotary import RotaryTable
from megatron_distkv.attention.span_tensors import KeptSpans
from megatron_distkv.messages import Scoring
from megatron_distkv.ops import (
    merge_out,
    micro_attention_int8_out,
    micro_attention_out,
    pack_rblocks_into,
    store_kv,
    unpack_rblocks,
)


class NewKeys(NamedTuple):
    """K and V of a step's new tokens, `[T, K, D]`; K is to be turned by these angles, if there are any."""

    k_TKD: torch.Tensor
    v_TKD: torch.Tensor
    angles: RotaryTable | tuple[()] = ()


class _Room(NamedTuple):
    """For a layer's results: out `[T, H, D]` and lse `[T, H]` over its own rBlocks, which becomes that over both, and
    over past ones."""

    both: tuple[torch.Tensor, torch.Tensor]  # own and past, stacked
    own: tuple[torch.Tensor, torch.Tensor]
    past: tuple[torch.Tensor, torch.Tensor]


class OpenRBlocks:
    """`begin_step`, then `attend` in each layer."""

    def __init__(self, pool_BLKX: torch.Tensor, slots_OLK2ND: torch.Tensor) -> None:
        """`pool_BLKX`: packed (ops.int8_kv). `slots_OLK2ND`: a place for each request's open rBlock."""
        self._pool = pool_BLKX
        self.full = unpack_rblocks(pool_BLKX, slots_OLK2ND.shape[-1])
        self._slots = slots_OLK2ND
        self._scratch = slots_OLK2ND.new_zeros((0, 1, *slots_OLK2ND.shape[2:]))
        self._kept_spans = KeptSpans(slots_OLK2ND.shape[4])
        self._index: OpenIndex | None = None
        self._room: _Room | None = None

    def begin_step(self, slices: Sequence[OpenSlice]) -> None:
        """Raises IntegrityError when a new token has no local rBlock, or no slot."""
        self._index = index = open_index(slices, self._slots.shape[4], self._kept_spans)
        num_places = sum(map(len, index.places))
        if not index.in_slots and num_places > len(self._scratch):
            self._scratch = self._slots.new_zeros((num_places, 1, *self._slots.shape[2:]))

    def attend(
        self,
        layer: int,
        q_THD: torch.Tensor,
        new: NewKeys,
        positions_T: torch.Tensor,
        scale: float,
        scoring: Scoring,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the new tokens; out `[T, H, D]` and lse `[T, H]`, fp32, over all local keys.

        What is in them lasts until the next layer, as AttentionMetadata's results.
        """
        index, room = self._index, self._room_for(q_THD)
        assert index is not None
        written, of_layer = self.store(layer, new)
        rows = index.cu_queries, positions_T, scale
        limits = scoring.window, scoring.soft_cap
        micro_attention_out(q_THD, written, of_layer, *index.own, *rows, True, *limits, *room.own)
        if not len(index.past.block_ids_M):
            return room.own
        micro_attention_int8_out(q_THD, *self.full, layer, *index.past, *rows, False, *limits, *room.past)
        merge_out(*room.both, *room.own)
        return room.own

    def _room_for(self, q_THD: torch.Tensor) -> _Room:
        """The same for all layers, and steps of this shape: to make it anew costs a decode as much as its call."""
        if self._room is None or self._room.own[0].shape != q_THD.shape:
            outs_2THD = q_THD.new_empty((2, *q_THD.shape), dtype=torch.float32)
            lses_2TH = outs_2THD.new_empty(outs_2THD.shape[:-1])
            self._room = _Room((outs_2THD, lses_2TH), *zip(outs_2THD, lses_2TH, strict=True))
        return self._room

    @property
    def places(self) -> list[dict[int, int]]:
        """Of each slice of the step: where `store` has each rBlock that is written to."""
        assert self._index is not None
        return self._index.places

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
            pack_rblocks_into(written, of_layer, places, self._pool, layer, block_ids)
        if not index.in_slots:
            self._slots[index.left_open[1], layer] = written[index.left_open[0], 0]
        return written, of_layer
