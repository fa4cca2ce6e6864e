"""Which tokens of a sequence lie on which rank of a context group: zigzag, so that causal work is even.

C ranks cut the sequence into 2C chunks as equal as they can be; rank r holds chunks r and 2C - 1 - r, in this order
(Megatron's `get_batch_on_this_cp_rank`, but of any length):

    C = 2    | rank 0 | rank 1 | rank 1 | rank 0 |
"""

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch


class Segment(NamedTuple):
    """Consecutive tokens `start .. stop` of the sequence, all of one document, at `row` .. of their rank's shard."""

    start: int
    stop: int
    document: int
    row: int

    @property
    def rows(self) -> slice:
        return slice(self.row, self.row + self.stop - self.start)


@dataclass(frozen=True)
class ZigzagLayout:
    """`num_tokens` over `cp_size` ranks. Packed documents begin at `document_starts`; none sees another."""

    num_tokens: int
    cp_size: int
    document_starts: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        starts = self.document_starts
        if starts[:1] != (0,) or sorted(set(starts)) != list(starts) or starts[-1] > max(0, self.num_tokens - 1):
            raise ValueError(f"document_starts must begin with 0 and rise below {self.num_tokens}, got {starts}")

    @lru_cache(maxsize=256)  # noqa: B019  small, frozen, and few
    def segments(self, cp_rank: int) -> tuple[Segment, ...]:
        segments, row = [], 0
        for first, last in self._chunks(cp_rank):
            starts = self.document_starts
            inner = starts[bisect_right(starts, first) : bisect_left(starts, last)]
            for start, stop in zip([first, *inner], [*inner, last], strict=True):
                document = bisect_right(self.document_starts, start) - 1
                segments.append(Segment(start, stop, document, row))
                row += stop - start
        return tuple(segments)

    def tokens(self, cp_rank: int) -> torch.Tensor:
        """Each row's place in the whole sequence, int64."""
        parts = [torch.arange(segment.start, segment.stop) for segment in self.segments(cp_rank)]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)

    def positions(self, cp_rank: int) -> torch.Tensor:
        """Each row's place in its own document, int64."""
        begins = [(s, self.document_starts[s.document]) for s in self.segments(cp_rank)]
        parts = [torch.arange(segment.start - begin, segment.stop - begin) for segment, begin in begins]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)

    def _chunks(self, cp_rank: int) -> list[tuple[int, int]]:
        num_chunks = 2 * self.cp_size
        cuts = [number * self.num_tokens // num_chunks for number in range(num_chunks + 1)]
        low, high = cp_rank, num_chunks - 1 - cp_rank
        if low + 1 == high:  # the two in the middle touch
            return [(cuts[low], cuts[high + 1])] if cuts[low] < cuts[high + 1] else []
        chunks = [(cuts[chunk], cuts[chunk + 1]) for chunk in (low, high)]
        return [chunk for chunk in chunks if chunk[0] < chunk[1]]
