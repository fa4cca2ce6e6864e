"""What one forward pass needs to know about where its tokens' keys lie. Built once per step, the same on all ranks."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple, Protocol

import torch

from megatron_distkv.attention.partial import Merges
from megatron_distkv.attention.rotary import RotaryConfig, RotaryTable, rotary_table
from megatron_distkv.attention.span_tensors import KeptSpans
from megatron_distkv.errors import IntegrityError
from megatron_distkv.messages import QueryShare
from megatron_distkv.rblock import LocalSpan, RemoteSpan, Span


class SequenceSlice(Protocol):
    """Tokens at positions `[start, end)` of one request; `spans` cover positions `[0, end)`."""

    @property
    def start(self) -> int: ...
    @property
    def end(self) -> int: ...
    @property
    def spans(self) -> Sequence[Span]: ...


class RemoteSlice(NamedTuple):
    """One sequence of a share: queries one after the other from `first_position` on, and where their keys lie."""

    spans: list[RemoteSpan]
    first_position: int
    num_queries: int

    def within(self, window: int, rblock_size: int) -> QueryShare | None:
        """The rBlocks that some query sees, and the queries that see one; None: the window has left them all."""
        oldest_seen = self.first_position - window + 1
        loans: set[str] = set()
        block_ids: list[int] = []
        starts: list[int] = []
        for span in self.spans:
            hidden = min(max(oldest_seen // rblock_size - span.first, 0), len(span.block_ids))
            if hidden == len(span.block_ids):
                continue
            loans.add(span.loan_id)
            block_ids.extend(span.block_ids[hidden:])
            starts.extend((span.first + index) * rblock_size for index in range(hidden, len(span.block_ids)))
        if not block_ids:
            return None
        num_queries = min(self.num_queries, max(starts) + rblock_size - 1 + window - self.first_position)
        return QueryShare(sorted(loans), block_ids, num_queries, starts, self.first_position)


@dataclass
class RemoteShare:
    """What one creditor is asked: which of the batch's query rows, and the rBlocks of each sequence among them."""

    rows_R: torch.Tensor
    shares: list[QueryShare]
    slices: Sequence[RemoteSlice] = ()
    rblock_size: int = 0

    def within(self, window: int | None) -> "RemoteShare | None":
        """What is left of it for layers with such a window. Every row that is left sees a key there."""
        if window is None:
            return self
        rows, shares, first_row = [], [], 0
        for piece in self.slices:
            share = piece.within(window, self.rblock_size)
            if share is not None:
                rows.append(self.rows_R[first_row : first_row + share.num_queries])
                shares.append(share)
            first_row += piece.num_queries
        return RemoteShare(torch.cat(rows), shares) if shares else None


@dataclass
class AttentionMetadata:
    """T tokens of S sequences, packed one after the other; the index tensors are int64 (contract: ops.micro_attention).

    a sequence's keys = | remote spans: full, all in the past | local rBlocks: causal, end with its tokens |
    """

    positions_T: torch.Tensor
    slot_mapping_T: torch.Tensor
    cu_queries: torch.Tensor
    block_ids_M: torch.Tensor
    block_starts_M: torch.Tensor
    cu_blocks: torch.Tensor
    remote: dict[str, RemoteShare]  # by creditor
    merges: Merges = field(default_factory=Merges)
    _tables: dict[tuple[RotaryConfig, int], RotaryTable] = field(default_factory=dict)
    _results: dict[torch.Size, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def rotary_table(self, rotary: RotaryConfig, head_dim: int) -> RotaryTable:
        """Angles of this batch's positions: computed in the first layer, used by all."""
        key = (rotary, head_dim)
        if key not in self._tables:
            self._tables[key] = rotary_table(self.positions_T, rotary, head_dim)
        return self._tables[key]

    def results(self, q_THD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Room for a layer's out and lse (fp32), the same for all layers: what is in it lasts until the next one.

        To make them anew costs a decode as much as the rest of its call, and a prefill the system's zeroing of pages.
        """
        if q_THD.shape not in self._results:
            out_THD = torch.empty(q_THD.shape, dtype=torch.float32, device=q_THD.device)
            self._results[q_THD.shape] = out_THD, out_THD.new_empty(q_THD.shape[:2])
        return self._results[q_THD.shape]


def build_metadata(
    slices: Sequence[SequenceSlice],
    rblock_size: int,
    device: torch.device | None = None,
    kept: KeptSpans | None = None,
) -> AttentionMetadata:
    """`kept`: what the steps before have made of the same spans. Raises IntegrityError when a new token has no local
    rBlock.
    """
    kept = kept or KeptSpans(rblock_size, device)
    kept.begin_step()
    build = _Build(rblock_size)
    for piece in slices:
        build.add(piece)

    local = kept.joined(build.local)

    def int64(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    return AttentionMetadata(
        positions_T=int64(build.positions),
        slot_mapping_T=int64(build.slots),
        cu_queries=int64(build.cu_queries),
        block_ids_M=local.block_ids,
        block_starts_M=local.block_starts,
        cu_blocks=int64(build.cu_blocks),
        remote={
            name: RemoteShare(int64(build.rows[name]), [_share(piece) for piece in slices], slices, rblock_size)
            for name, slices in build.slices.items()
        },
    )


class _Build:
    def __init__(self, rblock_size: int) -> None:
        self._rblock_size = rblock_size
        self.positions: list[int] = []
        self.slots: list[int] = []
        self.cu_queries = [0]
        self.local: list[LocalSpan] = []
        self.cu_blocks = [0]
        self.rows: dict[str, list[int]] = {}
        self.slices: dict[str, list[RemoteSlice]] = {}

    def add(self, piece: SequenceSlice) -> None:
        first_row, num_queries = len(self.positions), piece.end - piece.start
        local: list[LocalSpan] = []
        remote: dict[str, list[RemoteSpan]] = {}
        for span in piece.spans:
            if isinstance(span, LocalSpan):
                local.append(span)
            else:
                remote.setdefault(span.creditor, []).append(span)
        self.positions.extend(range(piece.start, piece.end))
        self.slots.extend(_slots(piece, local, self._rblock_size))
        self.local.extend(local)
        self.cu_blocks.append(self.cu_blocks[-1] + sum(len(span.block_ids) for span in local))
        self.cu_queries.append(len(self.positions))
        for creditor, spans in remote.items():
            self.rows.setdefault(creditor, []).extend(range(first_row, first_row + num_queries))
            self.slices.setdefault(creditor, []).append(RemoteSlice(spans, piece.start, num_queries))


def _slots(piece: SequenceSlice, local: Sequence[LocalSpan], size: int) -> list[int]:
    """Where the KV of its new tokens goes. The newest rBlocks are in the last spans."""
    slots: list[int] = []
    end = piece.end  # of those that are not placed yet
    for span in reversed(local):
        start = max(piece.start, span.first * size)
        if start < end <= (span.first + len(span.block_ids)) * size:
            slots[:0] = [span.block_ids[x // size - span.first] * size + x % size for x in range(start, end)]
            end = start
        if end == piece.start:
            return slots
    if end > piece.start:
        raise IntegrityError(f"the token at position {end - 1} has no local rBlock")
    return slots


def _share(piece: RemoteSlice) -> QueryShare:
    block_ids = list(chain.from_iterable(span.block_ids for span in piece.spans))
    return QueryShare(sorted({span.loan_id for span in piece.spans}), block_ids, piece.num_queries)
