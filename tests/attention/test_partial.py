"""Merging layer after layer in the same room gives what each layer would give alone, to the bit."""

from collections.abc import Sequence

import pytest
import torch

from megatron_distkv.attention import Merges, Partial
from megatron_distkv.messages import Scoring
from megatron_distkv.ops import merge

T, H, D = 6, 4, 16
ALL, SOME_THAT_FOLLOW, SOME = torch.arange(T), torch.arange(2, 5), torch.tensor([5, 0, 3])
Layer = tuple[torch.Tensor, torch.Tensor, list[Partial]]


def layer_over(*rows: torch.Tensor) -> Layer:
    """A local result, and a partial of each of these rows."""
    partials = [Partial(r, torch.randn(len(r), H, D), torch.randn(len(r), H)) for r in rows]
    return torch.randn(T, H, D), torch.randn(T, H), partials


def alone(out_THD: torch.Tensor, lse_TH: torch.Tensor, partials: Sequence[Partial]) -> torch.Tensor:
    outs, lses = [out_THD], [lse_TH]
    for partial in partials:
        outs.append(torch.zeros(T, H, D).index_copy(0, partial.rows_R, partial.out_RHD))
        lses.append(torch.full((T, H), float("-inf")).index_copy(0, partial.rows_R, partial.lse_RH))
    return merge(torch.stack(outs), torch.stack(lses))[0]


@pytest.mark.parametrize("rows", [(ALL,), (ALL, SOME), (SOME_THAT_FOLLOW, SOME)])
def test_every_layer_of_a_step(rows: tuple[torch.Tensor, ...]) -> None:
    # Given one step's merges
    torch.manual_seed(0)
    merges = Merges()

    # When its layers, each with numbers of its own, are merged one after the other
    # Then nothing of an earlier one is left in a later one
    for layer in [layer_over(*rows) for _ in range(3)]:
        assert torch.equal(merges.merge(Scoring(), *layer), alone(*layer))


def test_layers_that_see_other_rows() -> None:
    """Windows hide rBlocks: their layers ask for fewer rows, or nobody."""
    torch.manual_seed(0)
    merges = Merges()
    wide, narrow, nothing = layer_over(ALL, SOME), layer_over(SOME_THAT_FOLLOW), layer_over()

    for scoring, layer in [(Scoring(), wide), (Scoring(window=8), narrow), (Scoring(window=2), nothing)] * 2:
        assert torch.equal(merges.merge(scoring, *layer), alone(*layer))


def test_a_creditor_that_is_lost_in_the_middle_of_a_step() -> None:
    # Given a layer with the partials of two
    torch.manual_seed(0)
    merges = Merges()
    out, lse, partials = layer_over(ALL, SOME)
    merges.merge(Scoring(), out, lse, partials)

    # When one of them, and then the other, answers no more
    # Then its last partial has no part in what follows
    for left in (partials[1:], partials[:1], []):
        assert torch.equal(merges.merge(Scoring(), out, lse, left), alone(out, lse, left))
