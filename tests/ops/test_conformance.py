"""One suite for every backend: shapes of real models, against float64 from the definition."""

import weakref

import pytest
import torch

from megatron_distkv.ops import gather_rblocks, merge, merge_out, micro_attention, scatter_rblocks, store_kv
from tests.ops.batch import LAYER, LAYERS, OUT_LIMIT, Batch, Case, Sequence, int64

MIXED = [Sequence(70, 1), Sequence(41, 6), Sequence(33, 33), Sequence(1, 1), Sequence(9, 0), Sequence(150, 130)]


@pytest.mark.parametrize("dtype", OUT_LIMIT, ids=str)
@pytest.mark.parametrize("head_dim", [16, 32, 64, 80, 96, 128, 256, 5, 6])
def test_every_head_size(dtype: torch.dtype, head_dim: int) -> None:
    batch = Batch(Case(dtype, 2, 2, head_dim, 16, MIXED))
    batch.check(*batch.attend())


@pytest.mark.parametrize("dtype", OUT_LIMIT, ids=str)
@pytest.mark.parametrize(("kv_heads", "group"), [(3, g) for g in range(1, 10)] + [(1, 16), (1, 40), (1, 71), (1, 130)])
def test_every_group_size(dtype: torch.dtype, kv_heads: int, group: int) -> None:
    batch = Batch(Case(dtype, kv_heads, group, 32, 16, [Sequence(70, 1), Sequence(23, 3), Sequence(50, 40)]))
    batch.check(*batch.attend())


@pytest.mark.parametrize("dtype", OUT_LIMIT, ids=str)
@pytest.mark.parametrize("rblock_size", [1, 2, 3, 8, 64, 100, 256])
def test_every_rblock_size(dtype: torch.dtype, rblock_size: int) -> None:
    batch = Batch(Case(dtype, 2, 4, 64, rblock_size, [*MIXED, Sequence(700, 1)]))
    batch.check(*batch.attend())


@pytest.mark.parametrize("dtype", OUT_LIMIT, ids=str)
def test_full_rblocks_without_a_mask(dtype: torch.dtype) -> None:
    # Given rBlocks that are all full and all in the queries' past, as a creditor has them: positions do not matter
    batch = Batch(Case(dtype, 2, 4, 64, 32, [Sequence(64, 1), Sequence(96, 40), Sequence(32, 2)]))
    positions = [int(batch.cu_blocks[s + 1] - batch.cu_blocks[s]) * 32 for s in range(3)]
    queries = [s.num_queries for s in batch.case.sequences]
    batch.positions, batch.starts = torch.zeros_like(batch.positions), torch.zeros_like(batch.starts)
    out, lse = batch.attend(causal=False)
    batch.positions = torch.cat([torch.full((n,), p) for n, p in zip(queries, positions, strict=True)])
    batch.check(out, lse)


def test_full_blocks_in_any_order_beside_tails() -> None:
    # Given sequences with much past, with none, with nothing but past and without queries, rBlocks in reverse order
    sequences = [Sequence(200, 3), Sequence(9, 9), Sequence(64, 1), Sequence(32, 0), Sequence(47, 20)]
    batch = Batch(Case(torch.float32, 2, 4, 64, 16, sequences))
    for s in range(len(sequences)):
        listed = slice(int(batch.cu_blocks[s]), int(batch.cu_blocks[s + 1]))
        batch.ids[listed], batch.starts[listed] = batch.ids[listed].flip(0), batch.starts[listed].flip(0)
    batch.check(*batch.attend())


@pytest.mark.parametrize("dtype", OUT_LIMIT, ids=str)
@pytest.mark.parametrize(("kv_heads", "group", "window"), [(2, 4, 1), (2, 4, 16), (1, 8, 33), (2, 3, 100), (1, 40, 17)])
def test_a_window_counts_the_querys_own_token(dtype: torch.dtype, kv_heads: int, group: int, window: int) -> None:
    # Given also a row whose whole window lies in the rBlocks before its last one, and NaN in slots that nobody sees
    batch = Batch(Case(dtype, kv_heads, group, 64, 16, MIXED))
    for s, sequence in enumerate(batch.case.sequences):
        first_seen = sequence.num_keys - sequence.num_queries - window + 1
        for block in batch.ids[int(batch.cu_blocks[s]) :][: max(0, first_seen) // 16]:
            batch.pool[block] = float("nan")
    batch.check(*batch.attend(window=window), window=window)


@pytest.mark.parametrize("window", [1, 20, 64])
def test_a_window_over_rblocks_of_the_past_needs_no_causality(window: int) -> None:
    # Given full rBlocks all in the past, as a creditor has them, and queries ever further on
    batch = Batch(Case(torch.float32, 2, 4, 32, 16, [Sequence(64, 3), Sequence(96, 40)]))
    lasts = torch.tensor([63] * 3 + [95] * 40)
    batch.positions = lasts + torch.cat([torch.arange(3) * 12, torch.arange(40)])

    # When attended
    out, lse = batch.attend(causal=False, window=window)

    # Then those whose window has passed see nothing
    batch.check(out, lse, window=window)
    empty = batch.positions - window >= lasts
    assert empty.any() == (window < 64)
    assert (out[empty] == 0).all()
    assert (lse[empty] == float("-inf")).all()


@pytest.mark.parametrize("dtype", OUT_LIMIT, ids=str)
@pytest.mark.parametrize("group", [1, 4, 8, 20])
def test_soft_cap_bends_the_scores_before_the_softmax(dtype: torch.dtype, group: int) -> None:
    # Given scores around the cap and far beyond it
    batch = Batch(Case(dtype, 2, group, 64, 16, MIXED))
    batch.scale = 1.0
    batch.check(*batch.attend(soft_cap=5.0), soft_cap=5.0)
    batch.check(*batch.attend(soft_cap=30.0, window=21), soft_cap=30.0, window=21)


@pytest.mark.parametrize("threads", [2, 3])
def test_a_long_sequence_is_the_same_on_any_number_of_threads(threads: int) -> None:
    # Given enough keys that kernels cut them among threads, and a prefill beside them
    case = Case(torch.bfloat16, 4, 4, 128, 64, [Sequence(5000, 1), Sequence(300, 300), Sequence(4500, 4)])
    batch = Batch(case)
    alone = batch.attend()
    batch.check(*alone)

    # When several threads compute it, several times
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        results = [batch.attend() for _ in range(5)]
    finally:
        torch.set_num_threads(before)

    # Then not a bit differs
    for out, lse in results:
        assert torch.equal(out, alone[0])
        assert torch.equal(lse, alone[1])


def test_large_scores_do_not_overflow() -> None:
    batch = Batch(Case(torch.float32, 2, 4, 64, 16, [Sequence(100, 1), Sequence(90, 60)]))
    batch.scale = 40.0
    batch.k[0] *= -1  # also all-negative tops
    out, lse = batch.attend()
    assert torch.isfinite(out).all()
    assert torch.isfinite(lse).all()


@pytest.mark.parametrize("dtype", OUT_LIMIT, ids=str)
@pytest.mark.parametrize("group", [1, 4, 8, 16])
def test_scores_that_grow_along_the_sequence(dtype: torch.dtype, group: int) -> None:
    # Given a dim of K that raises scores a little with each key, and by a leap in the middle
    batch = Batch(Case(dtype, 1, group, 64, 16, [Sequence(700, 1)]))
    ramp = torch.arange(len(batch.ids) * 16) * 0.04 - 20.0
    ramp[400:] += 12.0
    batch.pool[batch.ids, LAYER, :, 0, :, 0] = ramp.to(dtype).view(-1, 1, 16)
    batch.k[0][:, 0, 0] = ramp[:700].to(dtype)
    batch.q[..., 0] = 1 / batch.scale

    # When attended to, then weights that were formed before the largest score was known count for what they are
    batch.check(*batch.attend())


def test_merge_of_many_partials_with_empty_ones() -> None:
    torch.manual_seed(0)
    outs, lses = torch.randn(37, 40, 6, 80), torch.randn(37, 40, 6) * 30
    lses[torch.rand(lses.shape) < 0.3] = float("-inf")
    lses[:, 7] = float("-inf")
    out, lse = merge(outs, lses)
    weights = (lses.double() - lses.double().logsumexp(0)).exp().nan_to_num(0.0)
    assert torch.allclose(out.double(), (outs.double() * weights[..., None]).sum(0), atol=1e-5)
    assert torch.allclose(lse.double(), lses.double().logsumexp(0), atol=1e-4)
    # And the same bits into tensors at hand, which must be of the right shape, dtype and layout
    room = torch.full_like(out, 7.0), torch.full_like(lse, 7.0)
    merge_out(outs, lses, *room)
    assert torch.equal(room[0], out)
    assert torch.equal(room[1], lse)
    # And in place of one of the partials
    merge_out(outs, lses, outs[3], lses[3])
    assert torch.equal(outs[3], out)
    assert torch.equal(lses[3], lse)
    for wrong in (out[1:], out.double(), out.transpose(0, 1).contiguous().transpose(0, 1)):
        with pytest.raises(ValueError, match="out and lse must"):
            merge_out(outs, lses, wrong, lse)


@pytest.mark.parametrize("source", OUT_LIMIT, ids=str)
@pytest.mark.parametrize("target", OUT_LIMIT, ids=str)
def test_stored_values_are_rounded_as_torch_rounds(backend: str, source: torch.dtype, target: torch.dtype) -> None:
    if "interpreted" in backend and torch.bfloat16 in (source, target):
        pytest.skip("Triton's interpreter cuts bits off where its compiler rounds")
    # Given values over the whole range, ties, subnormals, infinities and NaN, in strided views
    torch.manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (2, 64, 3, 24), dtype=torch.int32)
    special = torch.tensor(
        [0.0, -0.0, float("inf"), float("-inf"), float("nan"), 65519.9, 65520.0, 6e-8, 2.9e-8, 1e-40]
    )
    values = torch.cat([bits.view(torch.float32), torch.randn(2, 64, 3, 24) * 3], dim=2)
    values[:, 0, 0, : len(special)] = special
    values[:, 1, 0] = (1 + torch.arange(24) / 512).repeat(2, 1)
    k, v = values.to(source)[..., 1:5, :].unbind()
    pool = torch.zeros(10, LAYERS, 4, 2, 8, 24, dtype=target)
    slots = torch.randperm(80)[:64]

    store_kv(k, v, pool, LAYER, slots)

    stored = pool[slots // 8, LAYER, :, :, slots % 8]
    for part, expected in enumerate((k, v)):
        torch.testing.assert_close(stored[:, :, part], expected.to(target), rtol=0, atol=0, equal_nan=True)


def test_an_index_outside_the_pool_is_refused(backend: str) -> None:
    if backend.startswith("triton"):
        pytest.skip("to look at indices is to wait for the GPU")
    batch = Batch(Case(torch.float32, 1, 1, 16, 8, [Sequence(20, 1)]))
    batch.ids[1] = len(batch.pool)
    with pytest.raises(IndexError):
        batch.attend()
    with pytest.raises(IndexError):
        gather_rblocks(batch.pool, batch.ids)
    batch.ids[1] = 0
    with pytest.raises(IndexError):
        micro_attention(
            batch.q, batch.pool, LAYERS, batch.ids, batch.starts, batch.cu_blocks, batch.cu_queries, batch.positions,
            batch.scale, True,
        )  # fmt: skip
    kv = torch.zeros(1, 1, 16)
    with pytest.raises(IndexError):
        store_kv(kv, kv.clone(), batch.pool, 0, int64(len(batch.pool) * 8))
    with pytest.raises(IndexError):
        store_kv(kv, kv.clone(), batch.pool, LAYERS, int64(0))
    with pytest.raises(IndexError):
        scatter_rblocks(torch.zeros(1, *batch.pool.shape[1:]), batch.pool, int64(len(batch.pool)))


def test_into_tensors_at_hand() -> None:
    # Given two batches of one shape, whose calls alternate as those of layers and steps do
    case = Case(torch.bfloat16, 2, 4, 64, 16, [Sequence(70, 1), Sequence(33, 33)])
    batches = [Batch(case, seed=1), Batch(case, seed=2)]
    outs = [torch.full(batch.q.shape, float("nan")) for batch in batches]
    lses = [torch.full(batch.q.shape[:2], float("nan")) for batch in batches]
    for _ in range(2):
        for batch, out, lse in zip(batches, outs, lses, strict=True):
            batch.q = batch.q.clone()
            batch.attend_into(out, lse)
            batch.check(*batch.attend())
    for batch, out, lse in zip(batches, outs, lses, strict=True):
        batch.check(out, lse)


def test_a_kept_call_is_no_call_with_anything_else(backend: str) -> None:
    if not backend.startswith("cpu"):
        pytest.skip("only the C++ kernels keep calls")
    # Given a call whose every argument is then replaced, one at a time, by one of another value or place
    batch = Batch(Case(torch.float32, 2, 2, 16, 8, [Sequence(20, 1), Sequence(9, 1)]))
    indices = {"ids": batch.ids, "starts": batch.starts, "positions": batch.positions}
    for name, tensor in indices.items():
        batch.check(*batch.attend())
        setattr(batch, name, tensor.flip(0).contiguous())
        other, _ = batch.attend()
        setattr(batch, name, tensor.clone())
        batch.check(*batch.attend())
        assert not torch.allclose(other, batch.attend()[0])
    for options in ((0.9, True), (batch.scale, False), (batch.scale, True, 3), (batch.scale, True, None, 0.5)):
        calls = [
            micro_attention(
                batch.q, batch.pool, LAYER, batch.ids, batch.starts, batch.cu_blocks, batch.cu_queries,
                batch.positions, *given,
            )[0]
            for given in ((batch.scale, True), options, (batch.scale, True))
        ]  # fmt: skip
        assert torch.equal(calls[0], calls[2])
        assert not torch.allclose(calls[0], calls[1])
    batch.q = batch.q.mT.contiguous().mT  # the same shape and numbers, other strides
    batch.check(*batch.attend())


def test_nothing_is_written_where_the_result_does_not_fit(backend: str) -> None:
    if backend == "reference":
        pytest.skip("torch raises errors of its own")
    batch = Batch(Case(torch.float32, 1, 2, 16, 8, [Sequence(20, 3)]))
    with pytest.raises(ValueError, match="shape"):
        batch.attend_into(torch.empty(2, 2, 16), torch.empty(3, 2))
    with pytest.raises(ValueError, match="fp32"):
        batch.attend_into(torch.empty(3, 2, 16, dtype=torch.bfloat16), torch.empty(3, 2))


def test_a_kept_call_keeps_no_pool_alive() -> None:
    batch = Batch(Case(torch.float32, 1, 2, 16, 8, [Sequence(20, 3)]))
    batch.attend()
    pool = weakref.ref(batch.pool)
    del batch
    assert pool() is None


def test_a_compiled_caller_gets_the_same() -> None:
    batch = Batch(Case(torch.float32, 2, 2, 16, 8, [Sequence(20, 3)]))
    out, lse = torch.compile(batch.attend, backend="eager", fullgraph=True)()
    batch.check(out, lse)


def test_shapes_that_do_not_fit_are_refused(backend: str) -> None:
    if backend == "reference":
        pytest.skip("torch raises errors of its own")
    batch = Batch(Case(torch.float32, 1, 2, 16, 8, [Sequence(20, 3)]))
    kv, slots = torch.zeros(2, 1, 16), int64(0)
    with pytest.raises(ValueError, match="a row per slot"):
        store_kv(kv, kv.clone(), batch.pool, 0, slots)
    batch.ids = batch.ids.to(torch.int32)
    with pytest.raises(ValueError, match="int64"):
        batch.attend()
