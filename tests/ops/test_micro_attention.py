"""MicroAttention and merge against dense attention in float64: any split over rBlocks and holders, any order."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron_distkv.kernels import reference

from megatron_distkv.ops import merge, micro_attention, store_kv
from tests.ops.dense import dense_attention, relative_error

LAYER, LAYERS = 1, 2


def int64(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def pool_with(k_XKD: torch.Tensor, v_XKD: torch.Tensor, rblock_size: int, rng: random.Random) -> tuple:
    """A pool that holds X tokens in scattered rBlocks; returns it and the physical ids in order."""
    num_tokens, kv_heads, head_dim = k_XKD.shape
    count = -(-num_tokens // rblock_size)
    pool = torch.full((count + 3, LAYERS, kv_heads, 2, rblock_size, head_dim), 1e4, dtype=k_XKD.dtype)
    ids = rng.sample(range(count + 3), count)
    slots = int64(*(ids[t // rblock_size] * rblock_size + t % rblock_size for t in range(num_tokens)))
    store_kv(k_XKD, v_XKD, pool, LAYER, slots)
    return pool, ids


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    num_keys=st.integers(1, 70),
    num_queries=st.integers(1, 9),
    kv_heads=st.sampled_from([1, 2, 3]),
    group=st.sampled_from([1, 2, 5]),
    head_dim=st.sampled_from([4, 10]),
    rblock_size=st.sampled_from([1, 4, 7, 16]),
    num_parts=st.integers(1, 5),
    seed=st.integers(0, 10_000),
)
def test_any_split_in_any_order_merges_to_one_shot_attention(
    num_keys: int,
    num_queries: int,
    kv_heads: int,
    group: int,
    head_dim: int,
    rblock_size: int,
    num_parts: int,
    seed: int,
) -> None:
    # Given tokens in scattered rBlocks, and the last few of them as queries
    torch.manual_seed(seed)
    rng = random.Random(seed)
    num_queries = min(num_queries, num_keys)
    q = torch.randn(num_queries, kv_heads * group, head_dim) * 2
    k, v = torch.randn(2, num_keys, kv_heads, head_dim).unbind()
    positions = torch.arange(num_keys - num_queries, num_keys)
    pool, ids = pool_with(k, v, rblock_size, rng)

    # When the rBlocks are dealt to several holders (some may get none), and the partials merged in any order
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    for index in range(len(ids)):
        rng.choice(parts).append(index)
    partials = []
    for part in rng.sample(parts, num_parts):
        starts = [index * rblock_size for index in part]
        held = [ids[index] for index in part]
        cu_blocks, cu_queries = int64(0, len(part)), int64(0, num_queries)
        partials.append(
            micro_attention(
                q, pool, LAYER, int64(*held), int64(*starts), cu_blocks, cu_queries, positions, 0.3, causal=True
            )
        )
    out, lse = merge(torch.stack([p[0] for p in partials]), torch.stack([p[1] for p in partials]))

    # Then the result is dense attention
    expected_out, expected_lse = dense_attention(q, k, v, positions, 0.3)
    assert relative_error(out, expected_out) < 1e-5
    assert (lse.double() - expected_lse).abs().max() < 1e-4


def test_sequences_of_a_mixed_batch_do_not_see_each_other() -> None:
    # Given two sequences in one pool: a decode and a prefill chunk
    torch.manual_seed(1)
    k, v = torch.randn(2, 40, 2, 8).unbind()
    pool, ids = pool_with(k, v, 8, random.Random(3))
    q = torch.randn(5, 4, 8)
    positions = int64(15, 20, 21, 22, 23)
    ids_t, starts = int64(ids[0], ids[1], ids[2], ids[3], ids[4]), int64(0, 8, 0, 8, 16)

    # When one call computes both
    out, lse = micro_attention(
        q, pool, LAYER, ids_t, starts, int64(0, 2, 5), int64(0, 1, 5), positions, 0.5, causal=True
    )

    # Then each is as if alone
    first, _ = dense_attention(q[:1], k[:16], v[:16], int64(15), 0.5)
    second, second_lse = dense_attention(q[1:], k[16:40], v[16:40], int64(20, 21, 22, 23), 0.5)
    assert relative_error(out[:1], first) < 1e-5
    assert relative_error(out[1:], second) < 1e-5
    assert (lse[1:] - second_lse).abs().max() < 1e-4


def test_without_keys_the_partial_is_empty() -> None:
    pool = torch.randn(2, LAYERS, 1, 2, 4, 8)
    nothing = torch.empty(0, dtype=torch.int64)
    q, positions = torch.randn(3, 2, 8), int64(0, 1, 2)
    out, lse = micro_attention(q, pool, 0, nothing, nothing, int64(0, 0), int64(0, 3), positions, 1.0, causal=True)
    assert (out == 0).all()
    assert (lse == float("-inf")).all()
    # keys that all lie in the future are no keys either
    out, lse = micro_attention(q, pool, 0, int64(1), int64(50), int64(0, 1), int64(0, 3), positions, 1.0, causal=True)
    assert (out == 0).all()
    assert (lse == float("-inf")).all()
    merged, merged_lse = merge(torch.stack([out, out]), torch.stack([lse, lse]))
    assert (merged == 0).all()
    assert (merged_lse == float("-inf")).all()


def test_a_long_context_is_computed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "KEY_TOKENS_AT_ONCE", 16)
    torch.manual_seed(0)
    k, v = torch.randn(2, 100, 2, 8).unbind()
    pool, ids = pool_with(k, v, 8, random.Random(0))
    q, positions = torch.randn(3, 4, 8), int64(40, 80, 99)
    starts = int64(*(8 * index for index in range(len(ids))))
    out, _ = micro_attention(
        q, pool, LAYER, int64(*ids), starts, int64(0, len(ids)), int64(0, 3), positions, 0.4, causal=True
    )
    assert relative_error(out, dense_attention(q, k, v, positions, 0.4)[0]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_kv_is_within_its_own_rounding(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    k, v = (x.to(dtype) for x in torch.randn(2, 64, 2, 16).unbind())
    pool, ids = pool_with(k, v, 16, random.Random(0))
    q, positions = torch.randn(4, 4, 16).to(dtype), int64(60, 61, 62, 63)
    out, _ = micro_attention(
        q, pool, LAYER, int64(*ids), int64(0, 16, 32, 48), int64(0, 4), int64(0, 4), positions, 0.25, causal=True
    )
    assert relative_error(out, dense_attention(q, k, v, positions, 0.25)[0]) < 4e-3
