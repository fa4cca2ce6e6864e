"""One parameter of a model under Megatron-core's name, and how tensor parallelism splits it."""

from enum import Enum
from typing import NamedTuple


class Split(Enum):
    WHOLE = "whole"
    ROWS = "rows"
    COLUMNS = "columns"
    GATED = "gated"
    VOCABULARY = "vocabulary"


class Range(NamedTuple):
    """Indices `start .. end` along the split dimension of the whole parameter."""

    start: int
    end: int

    @property
    def extent(self) -> int:
        return self.end - self.start


class Parameter(NamedTuple):
    name: str
    shape: tuple[int, ...]
    split: Split

    @property
    def dim(self) -> int:
        """The dimension along which it is split, and read."""
        return 1 if self.split is Split.COLUMNS else 0

    @property
    def extent(self) -> int:
        return self.shape[self.dim]

    def shape_of(self, num_indices: int) -> tuple[int, ...]:
        """Shape of a slice of so many indices along the split dimension."""
        shape = list(self.shape)
        shape[self.dim] = num_indices
        return tuple(shape)

    def rank_extent(self, size: int) -> int:
        """Indices that each of `size` ranks holds, padding included."""
        if self.split is Split.WHOLE:
            return self.extent
        return -(-self.extent // size)

    def rank_ranges(self, rank: int, size: int) -> list[Range]:
        """What rank `rank` of `size` holds, in its order, padding not included."""
        if self.split is Split.WHOLE:
            return [Range(0, self.extent)]
        each = self.rank_extent(size)
        if self.split is Split.GATED:
            half = each // 2
            return [Range(x + rank * half, x + (rank + 1) * half) for x in (0, self.extent // 2)]
        return [Range(min(rank * each, self.extent), min((rank + 1) * each, self.extent))]
