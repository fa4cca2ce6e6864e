"""int8 K and V: every backend computes what the scales say, near what the numbers were."""

import pytest
import torch

from megatron_distkv.ops import (
    micro_attention_int8,
    micro_attention_int8_out,
    pack_rblocks,
    pack_rblocks_into,
    quantize_rblocks,
    unpack_rblocks,
)
from tests.ops.batch import LAYER, Batch, Case, Sequence
from tests.ops.dense import relative_error


def head_bytes(rblock_size: int, head_dim: int) -> int:
    """Of one KV head of an rBlock, in a pool (rblock.int8_head_bytes, which where only torch is cannot be imported)."""
    return pack_rblocks(torch.zeros(1, 1, 1, 2, rblock_size, head_dim)).shape[-1]


def attend(batch: Batch, *, packed: bool = True, **limits: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Over the batch's pool in int8; the batch's K and V become what the int8 numbers stand for.

    `packed`: with the scales behind the numbers that they belong to, as in an instance's pool.
    """
    pool = batch.pool.nan_to_num(0.0)
    rblocks = unpack_rblocks(pack_rblocks(pool), batch.case.head_dim) if packed else quantize_rblocks(pool)
    int8, k_scales, v_scales = rblocks
    k, v = int8[:, LAYER].float().unbind(2)
    pool_BK2ND = torch.stack([k * k_scales[:, LAYER, :, None], v * v_scales[:, LAYER, ..., None]], dim=2)
    for s, sequence in enumerate(batch.case.sequences):
        ids = batch.ids[int(batch.cu_blocks[s]) : int(batch.cu_blocks[s + 1])]
        kv_2MNKD = pool_BK2ND[ids].permute(2, 0, 3, 1, 4)
        batch.k[s], batch.v[s] = kv_2MNKD.flatten(1, 2)[:, : sequence.num_keys].unbind()
    indices = (batch.ids, batch.starts, batch.cu_blocks, batch.cu_queries, batch.positions)
    return micro_attention_int8(batch.q, int8, k_scales, v_scales, LAYER, *indices, batch.scale, True, **limits)


SEQUENCES = [Sequence(150, 1), Sequence(41, 3), Sequence(70, 2), Sequence(90, 80), Sequence(5, 0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kv_heads", "group", "head_dim", "rblock_size"),
    [
        (2, 1, 120, 36),
        (2, 4, 128, 100),
        (1, 8, 64, 36),
        (1, 16, 256, 9),
        (2, 3, 80, 36),
        (1, 6, 96, 65),
        (1, 5, 30, 36),
    ],
)
def test_the_numbers_that_the_scales_stand_for(
    backend: str, dtype: torch.dtype, kv_heads: int, group: int, head_dim: int, rblock_size: int
) -> None:
    # Given some channels of K far larger than others, and a window and a soft cap
    batch = Batch(Case(torch.float32, kv_heads, group, head_dim, rblock_size, SEQUENCES))
    batch.pool[:, :, :, 0, :, ::7] *= 10
    batch.scale /= 4
    batch.q = batch.q.to(dtype)
    limits = {"window": 60, "soft_cap": 20.0}

    # When computed from int8
    out, lse = attend(batch, **limits)

    # Then nothing is lost beyond what int8 says: in decoding queries keep 15 bits and weights 16; in prefill, and on a
    # GPU's tensor cores, K and weights keep the 8 of bf16 where the queries have no more
    expected, expected_lse = batch.expected(**limits)
    is_rounded = torch.full((len(out),), dtype is torch.bfloat16 and backend in ("cpu-avx512bf16", "triton"))
    is_rounded[0] = is_rounded[0] and backend == "triton"
    for rows, limit in ((~is_rounded, 1e-3), (is_rounded, 1e-2)):
        if rows.any():
            assert relative_error(out[rows], expected[rows]) < limit
            assert (lse - expected_lse)[rows].abs().max() < limit


def test_prefill_of_bf16_queries_multiplies_bf16_where_the_machine_does(backend: str) -> None:
    if not backend.startswith("cpu"):
        pytest.skip("of the C++ kernels")
    # Given the same queries in bf16 and in fp32, many for a KV head and then few
    for num_queries in (40, 2):
        batch = Batch(Case(torch.float32, 2, 4, 128, 64, [Sequence(150, num_queries)]))
        batch.q = batch.q.to(torch.bfloat16)
        short, _ = attend(batch)
        batch.q = batch.q.float()
        long, _ = attend(batch)
        # Then rounding to bf16 shows in many rows, on such a machine, and nowhere else
        assert torch.equal(short, long) == (num_queries == 2 or backend != "cpu-avx512bf16")


def test_the_rounding_in_prefill_is_small_beside_that_to_int8() -> None:
    # Given keys of which few count for each query, and all
    for temperature in (4.0, 1.0):
        batch = Batch(Case(torch.bfloat16, 2, 4, 128, 64, [Sequence(300, 70)]))
        batch.scale *= temperature
        before, _ = batch.expected()
        out, _ = attend(batch)  # makes K and V those of int8
        exact, _ = batch.expected()
        assert (out - exact).norm() < 0.4 * (exact - before).norm()
        assert (out - before).norm() < 1.1 * (exact - before).norm()


@pytest.mark.parametrize("sequences", [[Sequence(2048, 1), Sequence(512, 40)], [Sequence(1024, 1), Sequence(300, 1)]])
def test_the_error_against_the_numbers_before(sequences: list[Sequence]) -> None:
    batch = Batch(Case(torch.bfloat16, 2, 4, 128, 64, sequences))
    exact, exact_lse = batch.expected()
    out, lse = attend(batch, packed=False)
    assert relative_error(out, exact) < 1.5e-2
    assert (lse - exact_lse).abs().max() < 1e-2


def test_scales_that_do_not_fit_are_refused(backend: str) -> None:
    if backend == "reference":
        pytest.skip("torch raises errors of its own")
    batch = Batch(Case(torch.float32, 1, 2, 64, 8, [Sequence(16, 1)]))
    int8, k_scales, v_scales = quantize_rblocks(batch.pool.nan_to_num(0.0))
    indices = (batch.ids, batch.starts, batch.cu_blocks, batch.cu_queries, batch.positions)
    with pytest.raises(ValueError, match="scales"):
        micro_attention_int8(batch.q, int8, k_scales[:1], v_scales, LAYER, *indices, 1.0, True)


def test_other_scales_are_another_call(backend: str) -> None:
    if not backend.startswith("cpu"):
        pytest.skip("only the C++ kernels keep calls")
    # Given a pool of full rBlocks and a call that is kept
    batch = Batch(Case(torch.float32, 1, 2, 64, 8, [Sequence(16, 1)]))
    pool, k_scales, v_scales = quantize_rblocks(batch.pool.nan_to_num(0.0))
    indices = (batch.ids, batch.starts, batch.cu_blocks, batch.cu_queries, batch.positions)
    first, _ = micro_attention_int8(batch.q, pool, k_scales, v_scales, LAYER, *indices, 0.1, True)
    # When only V's scales are of another tensor, or K's
    twice, _ = micro_attention_int8(batch.q, pool, k_scales, v_scales * 2, LAYER, *indices, 0.1, True)
    colder, _ = micro_attention_int8(batch.q, pool, k_scales * 0, v_scales, LAYER, *indices, 0.1, True)
    # Then they count
    torch.testing.assert_close(twice, first * 2)
    assert not torch.allclose(colder, first)
    # And an int8 call beside one of another pool, as each layer has them, into tensors at hand or not, changes neither
    batch.pool.nan_to_num_(0.0)
    for _ in range(2):
        batch.check(*batch.attend())
        room = torch.full_like(first, 7.0), torch.full(first.shape[:2], 7.0)
        micro_attention_int8_out(batch.q, pool, k_scales, v_scales, LAYER, *indices, 0.1, True, None, None, *room)
        assert torch.equal(room[0], first)


def test_packed_rblocks_hold_the_same_and_say_how_many_bytes_they_are(backend: str) -> None:
    rblock = pytest.importorskip("megatron_distkv.rblock", reason="needs more than torch", exc_type=ImportError)
    rblocks = torch.randn(3, 2, 2, 2, 6, 10)
    packed = pack_rblocks(rblocks)
    assert packed.shape == (3, 2, 2, rblock.int8_head_bytes(6, 10))
    for got, expected in zip(unpack_rblocks(packed, 10), quantize_rblocks(rblocks), strict=True):
        assert torch.equal(got, expected)
        assert got.untyped_storage().data_ptr() == packed.untyped_storage().data_ptr()


def test_heads_that_do_not_lie_at_even_distances_are_refused(backend: str) -> None:
    if not backend.startswith("cpu"):
        pytest.skip("the others take any strides")
    batch = Batch(Case(torch.float32, 2, 2, 64, 8, [Sequence(16, 1)]))
    rblocks = quantize_rblocks(batch.pool.nan_to_num(0.0))
    indices = (batch.ids, batch.starts, batch.cu_blocks, batch.cu_queries, batch.positions)
    for wrong in range(3):
        uneven = [x.transpose(0, 1).contiguous().transpose(0, 1) if i == wrong else x for i, x in enumerate(rblocks)]
        with pytest.raises(ValueError, match="at even distances"):
            micro_attention_int8(batch.q, uneven[0], uneven[1], uneven[2], LAYER, *indices, 1.0, True)


@pytest.mark.parametrize(("dtype", "rblock_size", "head_dim"), [(torch.float32, 6, 10), (torch.bfloat16, 64, 80)])
def test_packing_into_a_pool_is_the_same_to_the_bit(dtype: torch.dtype, rblock_size: int, head_dim: int) -> None:
    # Given rBlocks of large and tiny tokens, some of them and some channels zero, and a pool with something in it
    torch.manual_seed(0)
    rblocks = torch.randn(4, 3, 2, 2, rblock_size, head_dim) * torch.rand(rblock_size, 1).mul(20).exp2()
    rblocks[1, :, :, :, 2] = rblocks[1, ..., 3] = 0
    rblocks = rblocks.to(dtype)
    pool = torch.full((5, 2, 2, head_bytes(rblock_size, head_dim)), 77, dtype=torch.uint8)
    expected = pool.clone()
    # When two of them go to two places of another layer
    places, block_ids = torch.tensor([3, 1]), torch.tensor([0, 4])
    pack_rblocks_into(rblocks, 2, places, pool, 1, block_ids)
    # Then those hold what `pack_rblocks` gives, and all others what they held
    expected[block_ids, 1] = pack_rblocks(rblocks[places, 2:])[:, 0]
    assert torch.equal(pool, expected)


def test_what_is_no_finite_number_shows_in_the_scales() -> None:
    rblocks = torch.randn(1, 1, 2, 2, 8, 32)
    rblocks[0, 0, 1, 0, 3, 4], rblocks[0, 0, 0, 1, 5, 6] = float("nan"), float("inf")
    pool = torch.zeros(1, 1, 2, head_bytes(8, 32), dtype=torch.uint8)
    pack_rblocks_into(rblocks, 0, torch.tensor([0]), pool, 0, torch.tensor([0]))
    _, k_scales, v_scales = unpack_rblocks(pool, 32)
    assert (~k_scales.isfinite()).nonzero().tolist() == [[0, 0, 1, 4]]
    assert (~v_scales.isfinite()).nonzero().tolist() == [[0, 0, 0, 5]]


def test_packing_outside_or_into_a_pool_of_another_shape_is_refused(backend: str) -> None:
    if not backend.startswith("cpu"):
        pytest.skip("torch raises errors of its own")
    rblocks, pool = torch.zeros(2, 1, 2, 2, 8, 16), torch.zeros(3, 1, 2, head_bytes(8, 16), dtype=torch.uint8)
    good = {
        "from_layer": 0,
        "from_ids": torch.tensor([1]),
        "pool_BLKX": pool,
        "layer": 0,
        "block_ids": torch.tensor([2]),
    }
    pack_rblocks_into(rblocks, **good)
    for wrong in ({"from_layer": 1}, {"layer": -1}, {"from_ids": torch.tensor([2])}, {"block_ids": torch.tensor([3])}):
        with pytest.raises(IndexError):
            pack_rblocks_into(rblocks, **{**good, **wrong})
    for wrong in ({"pool_BLKX": pool[:, :, :1]}, {"pool_BLKX": pool[..., 1:]}, {"block_ids": torch.tensor([0, 1])}):
        with pytest.raises(ValueError, match="rBlocks"):
            pack_rblocks_into(rblocks, **{**good, **wrong})
