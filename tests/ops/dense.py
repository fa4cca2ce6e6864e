"""An independent reference: dense attention in float64, written from the definition."""

import torch


def dense_attention(
    q_THD: torch.Tensor,
    k_XKD: torch.Tensor,
    v_XKD: torch.Tensor,
    positions_T: torch.Tensor,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of queries at `positions_T` over keys at positions 0..X-1; returns out and LSE in float64."""
    group = q_THD.shape[1] // k_XKD.shape[1]
    k, v = (x.double().repeat_interleave(group, dim=1) for x in (k_XKD, v_XKD))
    scores = torch.einsum("thd,xhd->thx", q_THD.double(), k) * scale
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    keys, queries = torch.arange(len(k_XKD))[None], positions_T[:, None]
    seen = keys <= queries if window is None else (keys <= queries) & (keys > queries - window)
    scores = scores.masked_fill(~seen[:, None], float("-inf"))
    return torch.einsum("thx,xhd->thd", scores.softmax(-1).nan_to_num(0.0), v), scores.logsumexp(-1)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest relative L2 error per token and head."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float(((actual - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-12)).max())
