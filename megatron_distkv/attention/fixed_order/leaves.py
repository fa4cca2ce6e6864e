"""Partials of single rBlocks in a pool, for its owner or for a debtor, and their merges (tree.py)."""

import threading
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch

from megatron_distkv.attention.fixed_order.tree import Family, Merges, Node, cover, merge_up
from megatron_distkv.errors import DistkvError
from megatron_distkv.messages import QueryShare, Scoring
from megatron_distkv.ops import Int8RBlocks, merge_out, micro_attention_int8, micro_attention_out

KV: TypeAlias = torch.Tensor | Int8RBlocks  # what attention reads of a pool (ops.readable)

# Partials that are held at one time: of a model with 32 heads of 128 dims 64 MiB. More queries wait for their turn.
MOST_PARTIALS = 4096


class Leaves(NamedTuple):
    """P pairs of a query row and an rBlock, each computed alone, so that nothing beside it changes a bit (int64)."""

    place: slice  # of the buffer
    rows_P: torch.Tensor
    block_ids_P: torch.Tensor
    block_starts_P: torch.Tensor
    positions_P: torch.Tensor
    cu_P1: torch.Tensor

    def attend(
        self,
        q_THD: torch.Tensor,
        kv: KV,
        layer: int,
        scale: float,
        scoring: Scoring,
        out: torch.Tensor,
        lse: torch.Tensor,
    ) -> None:
        """Into their place in `out` `[rows, H, D]` and `lse` `[rows, H]`."""
        if self.place.start == self.place.stop:
            return
        q_PHD, limits = q_THD[self.rows_P], (scoring.window, scoring.soft_cap)
        out_PHD, lse_PH = out[self.place], lse[self.place]
        args = (
            layer, self.block_ids_P, self.block_starts_P, self.cu_P1, self.cu_P1, self.positions_P,
            scoring.scale or scale, True, *limits,
        )  # fmt: skip
        if isinstance(kv, Int8RBlocks):
            out_PHD[:], lse_PH[:] = micro_attention_int8(
                q_PHD, kv.pool_BLK2ND, kv.k_scales_BLKD, kv.v_scales_BLKN, *args
            )
        else:
            micro_attention_out(q_PHD, kv, *args, out_PHD, lse_PH)


class LeafList:
    """Leaves in the making, rBlock by rBlock: the queries that share an rBlock follow each other and read it once."""

    def __init__(self, begin: int) -> None:
        """Their place in the buffer begins there."""
        self._begin = self.end = begin
        # Of each rBlock's queries:
        self._counts: list[int] = []
        self._first_rows: list[int] = []
        self._first_positions: list[int] = []
        self._block_ids: list[int] = []
        self._block_starts: list[int] = []

    def add(self, rows: range, first_position: int, block_ids: list[int], block_starts: list[int]) -> range:
        """Where the partials of each rBlock begin."""
        begin, count, num_rblocks = self.end, len(rows), len(block_ids)
        self._counts += [count] * num_rblocks
        self._first_rows += [rows.start] * num_rblocks
        self._first_positions += [first_position] * num_rblocks
        self._block_ids += block_ids
        self._block_starts += block_starts
        self.end += count * num_rblocks
        return range(begin, self.end, count)

    def leaves(self) -> Leaves:
        counts, rows, positions, block_ids, block_starts = torch.tensor(
            [self._counts, self._first_rows, self._first_positions, self._block_ids, self._block_starts],
            dtype=torch.int64,
        )
        num_pairs = self.end - self._begin
        in_rblock_P = torch.arange(num_pairs) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        return Leaves(
            slice(self._begin, self.end),
            rows.repeat_interleave(counts) + in_rblock_P,
            block_ids.repeat_interleave(counts),
            block_starts.repeat_interleave(counts),
            positions.repeat_interleave(counts) + in_rblock_P,
            torch.arange(num_pairs + 1),
        )


class Buffer:
    """Partials of a layer, and memory for them that is kept: fresh pages cost more than what is written to them."""

    def __init__(self) -> None:
        self._out = torch.empty(0)
        self._lse = torch.empty(0)
        self._gathered = torch.empty(0), torch.empty(0)

    def take(self, num_rows: int, num_heads: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Out `[rows, H, D]`, lse `[rows, H]`: fp32, anything but for row 0, which is empty."""
        if self._out.shape[0] < num_rows or self._out.shape[1:] != (num_heads, head_dim):
            self._out = torch.empty(num_rows, num_heads, head_dim)
            self._lse = torch.empty(num_rows, num_heads)
        self._out[0] = 0.0
        self._lse[0] = float("-inf")
        return self._out, self._lse

    def carry_out(self, merges: Merges) -> None:
        """Of what `take` gave."""
        out, lse = self._out, self._lse
        end = merges.num_rows - sum(level.shape[1] for level in merges.levels)
        for rows_FM in merges.levels:
            count = rows_FM.shape[1]
            outs, lses = self._gather(rows_FM)
            merge_out(outs, lses, out[end : end + count], lse[end : end + count])
            end += count

    def _gather(self, rows_FM: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        num_rows = rows_FM.numel()
        if self._gathered[0].shape[:1] < (num_rows,) or self._gathered[0].shape[1:] != self._out.shape[1:]:
            self._gathered = (
                self._out.new_empty((num_rows, *self._out.shape[1:])),
                self._lse.new_empty((num_rows, *self._lse.shape[1:])),
            )
        rows = rows_FM.view(-1)
        outs, lses = (
            torch.index_select(x, 0, rows, out=kept[:num_rows])
            for x, kept in zip((self._out, self._lse), self._gathered, strict=True)
        )
        return outs.unflatten(0, rows_FM.shape), lses.unflatten(0, rows_FM.shape)


_kept = threading.local()


def _buffer_of_thread() -> Buffer:
    buffer: Buffer | None = getattr(_kept, "buffer", None)
    if buffer is None:
        buffer = _kept.buffer = Buffer()
    return buffer


class FixedIndex(NamedTuple):
    """What a holder does for a question of fixed order (contract: messages.QueryHeader); used by all layers."""

    leaves: Leaves
    merges: Merges
    answer_A: torch.Tensor  # rows of the buffer
    scoring: Scoring
    num_rows: int

    def attend(self, q_THD: torch.Tensor, kv: KV, layer: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        buffer = _buffer_of_thread()
        out, lse = buffer.take(self.merges.num_rows, *q_THD.shape[1:])
        self.leaves.attend(q_THD, kv, layer, scale, self.scoring, out, lse)
        buffer.carry_out(self.merges)
        return out[self.answer_A], lse[self.answer_A]


def index_in_fixed_order(
    shares: Sequence[QueryShare], scoring: Scoring, rblock_size: int, num_partials: int
) -> FixedIndex:
    """Raises DistkvError for what a debtor of this design does not ask."""
    _check(shares, rblock_size)
    todo, families, covers, first_row = LeafList(1), [], [], 0
    for share in shares:
        rows = range(first_row, first_row + share.num_queries)
        begins = todo.add(rows, share.first_position, share.block_ids, share.block_starts)
        nodes = [Node(0, start // rblock_size) for start in share.block_starts]
        families.append(Family(dict(zip(nodes, begins, strict=True)), len(rows)))
        covers.append(cover(start // rblock_size for start in share.block_starts))
        first_row += share.num_queries
    merges = merge_up(families, todo.end, to_cover=True)
    runs = [(x.places[node], x.num_rows) for x, nodes in zip(families, covers, strict=True) for node in nodes]
    answer = [row for begin, count in runs for row in range(begin, begin + count)]
    if len(answer) != num_partials:
        raise DistkvError(f"{num_partials} partials are expected of a question that has {len(answer)}")
    return FixedIndex(todo.leaves(), merges, torch.tensor(answer, dtype=torch.int64), scoring, first_row)


def _check(shares: Sequence[QueryShare], rblock_size: int) -> None:
    num_pairs = sum(len(share.block_ids) * share.num_queries for share in shares)
    if num_pairs > MOST_PARTIALS and sum(share.num_queries for share in shares) > len(shares):
        raise DistkvError(f"{num_pairs} pairs of queries and rBlocks at one time")
    for share in shares:
        starts = share.block_starts
        if (
            len(starts) != len(share.block_ids)
            or len(set(starts)) < len(starts)
            or any(x % rblock_size for x in starts)
        ):
            raise DistkvError("a fixed order needs each rBlock's own position")
