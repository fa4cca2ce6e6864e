"""No speed is reported for a wrong answer."""

import torch


def attention_in_float64(
    q_THD: torch.Tensor, k: torch.Tensor, v: torch.Tensor, positions_T: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal, from the definition; k and v `[1, K, X, D]` of positions 0 .. X. A KV head at a time, for memory."""
    kv_heads, num_keys = k.shape[1:3]
    q_TKGD = q_THD.double().unflatten(1, (kv_heads, -1))
    is_future = torch.arange(num_keys) > positions_T[:, None, None]
    outs, lses = [], []
    for head in range(kv_heads):
        scores_TGX = q_TKGD[:, head] @ k[0, head].double().T * scale
        scores_TGX.masked_fill_(is_future, float("-inf"))
        outs.append(scores_TGX.softmax(-1) @ v[0, head].double())
        lses.append(scores_TGX.logsumexp(-1))
    return torch.cat(outs, 1), torch.cat(lses, 1)


def check(
    found: tuple[torch.Tensor, torch.Tensor], wanted: tuple[torch.Tensor, torch.Tensor], tolerance: float
) -> None:
    """Relative L2 error per token and head of out, absolute of lse; raises SystemExit."""
    error = ((found[0].double() - wanted[0]).norm(dim=-1) / wanted[0].norm(dim=-1)).max()
    lse_error = (found[1].double() - wanted[1]).abs().max()
    if not (error < tolerance and lse_error < 1e-4):
        raise SystemExit(f"wrong answer: out {float(error):.1e}, lse {float(lse_error):.1e}")
