"""Sampling against the definitions of top-k, top-p and min-p, computed row by row in float64."""

from typing import NamedTuple

import pytest
import torch

from megatron_distkv.ops import sample_tokens

# A limit or a draw that falls between two tokens by less than this may be decided either way.
SLACK = 1e-5


class Kind(NamedTuple):
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


KINDS = [
    Kind(), Kind(0.7, top_p=0.9), Kind(top_k=20), Kind(top_k=40, top_p=0.5), Kind(min_p=0.05),
    Kind(1.0, 50, 0.95, 0.01), Kind(2.0, top_p=0.999), Kind(top_p=1e-6), Kind(100.0, top_p=0.5), Kind(1e-6),
    Kind(top_k=1), Kind(top_k=1 << 40),
]  # fmt: skip


def call(logits_RV: torch.Tensor, kinds: list[Kind], uniform_R: torch.Tensor) -> list[int]:
    columns = zip(*kinds, strict=True)
    temperature, top_k, top_p, min_p = (torch.tensor(column, device="cpu") for column in columns)
    tokens = sample_tokens(
        logits_RV, temperature.float(), top_k.long(), top_p.float(), min_p.float(), uniform_R.to("cpu", torch.float64)
    )
    return tokens.tolist()


def allowed(logits_V: torch.Tensor, kind: Kind, uniform: float) -> set[int]:
    """The token that the definitions name, and those that a rounding may name instead."""
    return _drawn(logits_V, kind, uniform, 1 - SLACK) | _drawn(logits_V, kind, uniform, 1 + SLACK)


def _drawn(logits_V: torch.Tensor, kind: Kind, uniform: float, rounding: float) -> set[int]:
    weights = ((logits_V.double() - logits_V.double().max()) / kind.temperature).exp().tolist()
    order = sorted(range(len(weights)), key=lambda token: (-weights[token], token))
    kth = weights[order[min(kind.top_k or len(order), len(order)) - 1]]
    order = [token for token in order if weights[token] >= kth * (1 - SLACK)]
    total, before, kept = sum(weights[token] for token in order), 0.0, []
    for token in order:
        if kept and before >= kind.top_p * rounding * total and kind.top_p < 1:
            break
        kept.append(token)
        before += weights[token]
    kept = sorted(token for token in kept if weights[token] >= kind.min_p * rounding)
    total, begin, found = sum(weights[token] for token in kept), 0.0, set()
    for token in kept:
        end = begin + weights[token]
        if begin - SLACK * total <= uniform * total <= end + SLACK * total:
            found.add(token)
        begin = end
    return found


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocabulary", [1, 5, 131, 1000])
def test_every_kind_draws_what_its_definition_says(kind: Kind, dtype: torch.dtype, vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    # Given logits that are alike, and that are not
    scales = torch.tensor([0.0, 0.5, 1.0, 4.0, 30.0]).repeat(3)[:, None]
    logits_RV = (torch.randn(15, vocabulary, generator=generator, device="cpu") * scales.cpu()).to(dtype)
    uniform_R = torch.rand(15, generator=generator, device="cpu")
    uniform_R[0], uniform_R[1] = 0.0, 1.0 - 2.0**-24
    # When each is drawn from, then every token is one that it may be
    tokens = call(logits_RV.to(torch.get_default_device()), [kind] * 15, uniform_R)
    for row, token in enumerate(tokens):
        assert token in allowed(logits_RV[row], kind, float(uniform_R[row])), row


def test_a_large_vocabulary_in_one_batch_of_all_kinds() -> None:
    """Some limits of theirs lie among tens of thousands of equal logits."""
    generator = torch.Generator().manual_seed(0)
    kinds = [*KINDS, *KINDS]
    scales = torch.tensor([3.0] * len(KINDS) + [0.0] * len(KINDS), device="cpu")[:, None]
    logits_RV = torch.randn(len(kinds), 40_000, generator=generator, device="cpu") * scales
    uniform_R = torch.rand(len(kinds), generator=generator, device="cpu")
    batch = call(logits_RV.to(torch.get_default_device()), kinds, uniform_R)
    for row, kind in enumerate(kinds):
        assert batch[row] in allowed(logits_RV[row], kind, float(uniform_R[row])), row
        # And nobody else in the batch matters
        alone = call(logits_RV[row : row + 1].to(torch.get_default_device()), [kind], uniform_R[row : row + 1])
        assert alone == [batch[row]]


def test_temperature_zero_takes_the_first_of_the_largest() -> None:
    logits_RV = torch.tensor([[1.0, 7.0, 7.0, 2.0], [3.0, -1.0, 0.0, 3.0]])
    assert call(logits_RV, [Kind(0.0), Kind(0.0, top_k=2, top_p=0.1)], torch.tensor([0.9, 0.9])) == [1, 0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_is_told_apart_from_others(bad: float, temperature: float) -> None:
    logits_RV = torch.arange(40.0).reshape(4, 10)
    logits_RV[1, 0] = logits_RV[2, 9] = bad
    assert call(logits_RV, [Kind(temperature)] * 4, torch.full((4,), 1 - 2.0**-24)) == [9, -1, -1, 9]


def test_rows_that_are_a_piece_of_wider_ones() -> None:
    """As logits of a padded vocabulary are."""
    wide_RV = torch.zeros(2, 64)
    wide_RV[:, 50] = 9.0  # padding
    wide_RV[0, 7] = wide_RV[1, 3] = 5.0
    assert call(wide_RV[:, :41], [Kind(0.0), Kind(1e-6)], torch.tensor([0.0, 0.5])) == [7, 3]


def test_draws_follow_the_probabilities() -> None:
    probabilities = torch.tensor([0.5, 0.25, 0.15, 0.06, 0.04], device="cpu")
    logits_RV = probabilities.log().expand(4000, -1).to(torch.get_default_device())
    uniform_R = torch.rand(4000, generator=torch.Generator().manual_seed(3), device="cpu")
    drawn = torch.tensor(call(logits_RV, [Kind()] * 4000, uniform_R), device="cpu")
    frequency = torch.bincount(drawn, minlength=5) / 4000
    assert ((frequency - probabilities).abs() < 5 * (probabilities / 4000).sqrt()).all()  # five standard errors
