"""Gradients tile by tile against float64 autograd over all keys at once."""

from typing import NamedTuple

import pytest
import torch

from megatron_distkv.ops import tile_backward
from tests.ops.dense import relative_error

LIMIT = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


class Attended(NamedTuple):
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    d_out: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    gradients: tuple[torch.Tensor, ...]


def attend_in_float64(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, num_past: int) -> Attended:
    """Keys `num_past` and on are the queries' own tokens."""
    q64, k64, v64 = (x.double().requires_grad_() for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    k_all, v_all = (x.repeat_interleave(group, 2) for x in (k64, v64))
    scores = torch.einsum("sbhd,xbhd->sbhx", q64, k_all) * q.shape[3] ** -0.5
    future = torch.arange(len(k))[None] > num_past + torch.arange(len(q))[:, None]
    scores = scores.masked_fill(future[:, None, None], float("-inf"))
    out, lse = torch.einsum("sbhx,xbhd->sbhd", scores.softmax(-1), v_all), scores.logsumexp(-1)
    d_out = torch.randn_like(q)
    gradients = torch.autograd.grad(out, (q64, k64, v64), d_out.double())
    return Attended(q, k, v, d_out, out.detach().to(q.dtype), lse.detach().float(), gradients)


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize(
    ("sequences", "heads", "kv_heads", "head_dim"), [(1, 4, 1, 64), (2, 4, 2, 32), (2, 3, 3, 80), (1, 2, 1, 256)]
)
def test_gradients_of_two_tiles_add_up(
    dtype: torch.dtype, sequences: int, heads: int, kv_heads: int, head_dim: int
) -> None:
    # Given 45 tokens with a past of 70, their q, k and v slices of one tensor as Megatron's layers give them
    torch.manual_seed(0)
    packed = torch.randn(115, sequences, heads + 2 * kv_heads, head_dim).to(dtype)
    q, k, v = packed.split([heads, kv_heads, kv_heads], dim=2)
    q = q[70:]
    attended = attend_in_float64(q, k, v, num_past=70)

    # When each tile is given the global out and LSE
    tiles = [
        tile_backward(
            attended.d_out, q, k[part], v[part], attended.out, attended.lse, head_dim**-0.5, is_causal=part.start == 70
        )
        for part in (slice(0, 70), slice(70, 115))
    ]

    # Then q's gradients add up, and keys keep their own
    d_q = tiles[0][0] + tiles[1][0]
    d_k, d_v = (torch.cat([tile[i] for tile in tiles]) for i in (1, 2))
    for found, expected in zip((d_q, d_k, d_v), attended.gradients, strict=True):
        assert relative_error(found.flatten(), expected.flatten()) < LIMIT[dtype]
