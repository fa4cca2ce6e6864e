"""What a step minimises: recall of the digits, and a little language modelling that keeps the prose predictable."""

import torch


def passkey_loss(nll_BT: torch.Tensor, is_answer_BT: torch.Tensor, prose_weight: float) -> torch.Tensor:
    """Mean over rows of (mean over answer digits + `prose_weight` * mean over the rest).

    Normalised per row, so that the mean over data-parallel ranks is the mean over the whole batch.
    """
    rest_BT = 1.0 - is_answer_BT
    answer_B = (nll_BT * is_answer_BT).sum(1) / is_answer_BT.sum(1).clamp_min(1.0)
    rest_B = (nll_BT * rest_BT).sum(1) / rest_BT.sum(1).clamp_min(1.0)
    return (answer_B + prose_weight * rest_B).mean()
