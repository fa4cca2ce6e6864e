"""What a step minimises: recall of the digits, and a little language modelling that keeps the prose predictable."""

import torch


def token_weights(is_answer_BT: torch.Tensor, prose_weight: float) -> torch.Tensor:
    """What each token's loss counts in the sum: mean over rows of (mean over digits + `prose_weight` * mean over rest).

    Normalised per row, so that the mean over data-parallel ranks is the mean over the whole batch.
    """
    rest_BT = 1.0 - is_answer_BT
    answer_BT = is_answer_BT / is_answer_BT.sum(1, keepdim=True).clamp_min(1.0)
    rest_BT = rest_BT / rest_BT.sum(1, keepdim=True).clamp_min(1.0)
    return (answer_BT + prose_weight * rest_BT) / len(is_answer_BT)
