"""Partial results of attention over some of a batch's keys, and their exact merge."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from megatron_distkv.messages import Scoring
from megatron_distkv.ops import merge_out


class Partial(NamedTuple):
    """`out_RHD` and `lse_RH` (fp32) for the query rows `rows_R` of a batch; the other rows have no keys here."""

    rows_R: torch.Tensor
    out_RHD: torch.Tensor
    lse_RH: torch.Tensor


class Merges:
    """One step's. Layers that score alike have partials of the same rows: the first makes room, all use it."""

    def __init__(self) -> None:
        self._rooms: dict[Scoring, _Room] = {}

    def merge(
        self, scoring: Scoring, out_THD: torch.Tensor, lse_TH: torch.Tensor, partials: Sequence[Partial]
    ) -> torch.Tensor:
        """Exact attention from the local result of all rows and partials of some rows; good until the next layer's."""
        if not partials:
            return out_THD
        room = self._rooms.get(scoring)
        if room is None or not room.is_for(partials):  # a creditor that is lost has none any more
            room = self._rooms[scoring] = _Room(out_THD, lse_TH, [partial.rows_R for partial in partials])
        return room.merge(out_THD, lse_TH, partials)


class _Place(NamedTuple):
    """Where one part goes. The views are all rows of the batch, of which it has `rows_R`; or, with None, its rows."""

    out_THD: torch.Tensor
    lse_TH: torch.Tensor
    rows_R: torch.Tensor | None = None

    def put(self, out: torch.Tensor, lse: torch.Tensor) -> None:
        if self.rows_R is None:
            self.out_THD.copy_(out)
            self.lse_TH.copy_(lse)
        else:
            self.out_THD[self.rows_R] = out
            self.lse_TH[self.rows_R] = lse


class _Room:
    """Rows without keys in a partial are (0, -inf) there, and stay so.

    outs, lses = | local, all rows | partial 1, its rows | partial 2, its rows | ...
    """

    def __init__(self, out_THD: torch.Tensor, lse_TH: torch.Tensor, rows: Sequence[torch.Tensor]) -> None:
        self._rows = rows
        self._outs = out_THD.new_zeros((1 + len(rows), *out_THD.shape))
        self._lses = lse_TH.new_full((1 + len(rows), *lse_TH.shape), float("-inf"))
        parts = zip(self._outs[1:], self._lses[1:], rows, strict=True)
        self._places = [_Place(self._outs[0], self._lses[0]), *(_place(*part) for part in parts)]
        self._merged = torch.empty_like(out_THD), torch.empty_like(lse_TH)

    def is_for(self, partials: Sequence[Partial]) -> bool:
        """By identity: a step makes its rows once."""
        return [id(partial.rows_R) for partial in partials] == [id(rows_R) for rows_R in self._rows]

    def merge(self, out_THD: torch.Tensor, lse_TH: torch.Tensor, partials: Sequence[Partial]) -> torch.Tensor:
        parts = [(out_THD, lse_TH), *(partial[1:] for partial in partials)]
        for place, part in zip(self._places, parts, strict=True):
            place.put(*part)
        merge_out(self._outs, self._lses, *self._merged)
        return self._merged[0]


def _place(out_THD: torch.Tensor, lse_TH: torch.Tensor, rows_R: torch.Tensor) -> _Place:
    """Rows of one request follow each other: copying to a view of them costs half as much."""
    rows = rows_R.tolist()
    if not rows or rows != list(range(rows[0], rows[-1] + 1)):
        return _Place(out_THD, lse_TH, rows_R)
    return _Place(out_THD[rows[0] : rows[-1] + 1], lse_TH[rows[0] : rows[-1] + 1])
