"""A partial result of attention over some of a batch's keys."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from megatron_distkv.ops import merge


class Partial(NamedTuple):
    """`out_RHD` and `lse_RH` (fp32) for the query rows `rows_R` of a batch; the other rows have no keys here."""

    rows_R: torch.Tensor
    out_RHD: torch.Tensor
    lse_RH: torch.Tensor


def merge_partials(out_THD: torch.Tensor, lse_TH: torch.Tensor, partials: Sequence[Partial]) -> torch.Tensor:
    """Exact attention from the local result of all rows and any number of partials of some rows."""
    if not partials:
        return out_THD
    outs = out_THD.new_zeros((1 + len(partials), *out_THD.shape))
    lses = lse_TH.new_full((1 + len(partials), *lse_TH.shape), float("-inf"))
    outs[0], lses[0] = out_THD, lse_TH
    for place, partial in enumerate(partials, start=1):
        outs[place, partial.rows_R] = partial.out_RHD
        lses[place, partial.rows_R] = partial.lse_RH
    return merge(outs, lses)[0]
