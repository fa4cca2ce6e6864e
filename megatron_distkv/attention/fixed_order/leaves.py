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
        """Into `out` `[P, H, D]` and `lse` `[P, H]`."""
        if not len(self.rows_P):
            return
        q_PHD, limits = q_THD[self.rows_P], (scoring.window, scoring.soft_cap)
        args = (
            layer, self.block_ids_P, self.block_starts_P, self.cu_P1, self.cu_P1, self.positions_P,
            scoring.scale or scale, True, *limits,
        )  # fmt: skip
        if isinstance(kv, Int8RBlocks):
            out[:], lse[:] = micro_attention_int8(q_PHD, kv.pool_BLK2ND, kv.k_scales_BLKD, kv.v_scales_BLKN, *args)
        else:
            micro_attention_out(q_PHD, kv, *args, out, lse)


class LeafList:
    """Leaves in the making, rBlock by rBlock: the queries that share an rBlock follow each other and read it once."""

    def __init__(self) -> None:
        self._rows: list[range] = []
        self._positions: list[range] = []
        self._blocks: list[tuple[int, int]] = []
        self.num_pairs = 0

    def add(self, rows: range, first_position: int, block_id: int, block_start: int) -> int:
        """Where its partials begin among those of the list."""
        begin = self.num_pairs
        self._rows.append(rows)
        self._positions.append(range(first_position, first_position + len(rows)))
        self._blocks.append((block_id, block_start))
        self.num_pairs += len(rows)
        return begin

    def leaves(self) -> Leaves:
        counts = torch.tensor([len(rows) for rows in self._rows], dtype=torch.int64)
        blocks_2M = torch.tensor(self._blocks, dtype=torch.int64).reshape(-1, 2).T
        block_ids_P, starts_P = (blocks_M.repeat_interleave(counts) for blocks_M in blocks_2M)
        return Leaves(
            _concatenated(self._rows, counts),
            block_ids_P,
            starts_P,
            _concatenated(self._positions, counts),
            torch.arange(self.num_pairs + 1),
        )


def _concatenated(ranges: Sequence[range], counts: torch.Tensor) -> torch.Tensor:
    begins = torch.tensor([some.start for some in ranges], dtype=torch.int64)
    ends = counts.cumsum(0)
    return torch.arange(int(counts.sum())) + (begins - (ends - counts)).repeat_interleave(counts)


class Buffer:
    """Partials of a layer, and memory for them that is kept: fresh pages cost more than what is written to them."""

    def __init__(self) -> None:
        self._out = torch.empty(0)
        self._lse = torch.empty(0)

    def take(self, num_rows: int, num_heads: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Out `[rows, H, D]`, lse `[rows, H]`: fp32, anything but for row 0, which is empty."""
        if self._out.shape[0] < num_rows or self._out.shape[1:] != (num_heads, head_dim):
            self._out = torch.empty(num_rows, num_heads, head_dim)
            self._lse = torch.empty(num_rows, num_heads)
        self._out[0] = 0.0
        self._lse[0] = float("-inf")
        return self._out, self._lse


_kept = threading.local()


def _buffer_of_thread() -> Buffer:
    buffer: Buffer | None = getattr(_kept, "buffer", None)
    if buffer is None:
        buffer = _kept.buffer = Buffer()
    return buffer


def carry_out(merges: Merges, out: torch.Tensor, lse: torch.Tensor) -> None:
    end = merges.num_rows - sum(level.shape[1] for level in merges.levels)
    for rows_FM in merges.levels:
        count = rows_FM.shape[1]
        merge_out(out[rows_FM], lse[rows_FM], out[end : end + count], lse[end : end + count])
        end += count


class FixedIndex(NamedTuple):
    """What a holder does for a question of fixed order (contract: messages.QueryHeader); used by all layers."""

    leaves: Leaves
    merges: Merges
    answer_A: torch.Tensor  # rows of the buffer
    scoring: Scoring
    num_rows: int

    def attend(self, q_THD: torch.Tensor, kv: KV, layer: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        num_pairs = len(self.leaves.rows_P)
        out, lse = _buffer_of_thread().take(self.merges.num_rows, *q_THD.shape[1:])
        places = slice(1, 1 + num_pairs)
        self.leaves.attend(q_THD, kv, layer, scale, self.scoring, out[places], lse[places])
        carry_out(self.merges, out, lse)
        return out[self.answer_A], lse[self.answer_A]


def index_in_fixed_order(
    shares: Sequence[QueryShare], scoring: Scoring, rblock_size: int, num_partials: int
) -> FixedIndex:
    """Raises DistkvError for what a debtor of this design does not ask."""
    _check(shares, rblock_size)
    todo, families, covers, first_row = LeafList(), [], [], 0
    for share in shares:
        rows, places = range(first_row, first_row + share.num_queries), {}
        for block_id, start in zip(share.block_ids, share.block_starts, strict=True):
            places[Node(0, start // rblock_size)] = 1 + todo.add(rows, share.first_position, block_id, start)
        families.append(Family(places, len(rows)))
        covers.append(cover(start // rblock_size for start in share.block_starts))
        first_row += share.num_queries
    merges = merge_up(families, 1 + todo.num_pairs, to_cover=True)
    begins = [(x.places[node], x.num_rows) for x, nodes in zip(families, covers, strict=True) for node in nodes]
    answer = [row for begin, count in begins for row in range(begin, begin + count)]
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
