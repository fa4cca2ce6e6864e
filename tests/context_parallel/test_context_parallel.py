"""Attention over a context group of real gloo processes, against float64 autograd on one process."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_distkv.attention import DenseAttention, DistAttention, RotaryConfig
from megatron_distkv.context_parallel import ContextShard, RingAttention, ZigzagLayout, ring_attention, tile_attention
from megatron_distkv.context_parallel.ring_steps import HeadSizes, plan_block, plan_ring_steps
from megatron_distkv.errors import ConfigError
from tests.context_parallel.context_ranks import NUM_RANKS, SCALE, Case, Ranks, Result, run_shard

GROUPS = [(4, 4), (4, 2), (4, 1), (3, 3), (6, 2)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    started = Ranks(tmp_path_factory.mktemp("ranks"))
    yield started
    started.close()


def reference(case: Case) -> Result:
    """Masked softmax in float64, differentiated by autograd."""
    q, k, v, d_out = (tensor.double() for tensor in case.tensors())
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    group = case.query_heads // case.kv_heads
    scores = torch.einsum("sbhd,xbhd->bhsx", q, k.repeat_interleave(group, 2)) * SCALE
    tokens = torch.arange(case.num_tokens)
    documents = (tokens[:, None] >= torch.tensor(case.document_starts)).sum(1)
    is_seen = (tokens[:, None] >= tokens) & (documents[:, None] == documents)
    weights = scores.masked_fill(~is_seen, float("-inf")).softmax(-1)
    out = torch.einsum("bhsx,xbhd->sbhd", weights, v.repeat_interleave(group, 2))
    out.backward(d_out)
    gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
    return Result(out.detach(), *gradients)


def assert_exact(result: Result, case: Case) -> None:
    for name, mine, exact in zip(("out", "d_q", "d_k", "d_v"), result, reference(case), strict=True):
        # A document's first token has no gradient at all in q: then the error counts as it is.
        error = float((mine.double() - exact).norm() / exact.norm().clamp_min(1.0))
        assert error <= TOLERANCE[case.dtype], f"{name} of {case}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_shards_together_are_single_process_attention(size: int, dtype: torch.dtype, ranks: Ranks) -> None:
    # Given multi-head, grouped and multi-query attention, and a length that no number of ranks divides
    for query_heads, kv_heads in GROUPS:
        case = Case(61, size, query_heads, kv_heads, batch=2, dtype=dtype)
        # Then out and all gradients are the whole sequence's
        assert_exact(ranks.run(case), case)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_packed_documents_do_not_see_each_other(size: int, ranks: Ranks) -> None:
    # Given documents of one token, of many, and over the ends of chunks
    case = Case(50, size, document_starts=(0, 1, 9, 25, 26, 47))
    assert_exact(ranks.run(case), case)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_length_heads_and_documents(ranks: Ranks, data: st.DataObject) -> None:
    kv_heads = data.draw(st.sampled_from([1, 2, 3]), "kv_heads")
    num_tokens = data.draw(st.integers(1, 40), "num_tokens")
    starts = data.draw(st.sets(st.integers(0, num_tokens - 1), max_size=5), "starts")
    case = Case(
        num_tokens,
        data.draw(st.integers(1, NUM_RANKS), "size"),
        kv_heads * data.draw(st.sampled_from([1, 2, 4]), "group"),
        kv_heads,
        head_dim=data.draw(st.sampled_from([4, 16, 20]), "head_dim"),
        batch=data.draw(st.integers(1, 2), "batch"),
        document_starts=tuple(sorted(starts | {0})),
        dtype=torch.float64,
        seed=data.draw(st.integers(0, 2**31), "seed"),
    )
    assert_exact(ranks.run(case), case)


def test_without_the_flash_kernel_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    # Given plain torch, as on other devices than CPUs: none is here, so that which one it is gets a false answer
    monkeypatch.setattr(tile_attention, "_has_flash", lambda x: False)
    for dtype in TOLERANCE:
        case = Case(30, 1, document_starts=(0, 7), dtype=dtype)
        assert_exact(run_shard(case, ContextShard(case.layout)), case)


@settings(deadline=None)
@given(st.integers(0, 200), st.integers(1, 9), st.data())
def test_a_layout_gives_every_token_to_one_rank(num_tokens: int, size: int, data: st.DataObject) -> None:
    starts = data.draw(st.sets(st.integers(0, max(0, num_tokens - 1)), max_size=6)) | {0}
    layout = ZigzagLayout(num_tokens, size, tuple(sorted(starts)))
    shards = [layout.tokens(rank) for rank in range(size)]
    assert sorted(torch.cat(shards).tolist()) == list(range(num_tokens))
    for rank, tokens in enumerate(shards):
        # Then positions count from the token's own document, and each shard's tokens are in order
        begins = [max(start for start in starts if start <= token) for token in tokens.tolist()]
        assert layout.positions(rank).tolist() == [t - b for t, b in zip(tokens.tolist(), begins, strict=True)]
        assert tokens.equal(tokens.sort().values)
        assert abs(len(tokens) - num_tokens / size) <= 2


def test_causal_work_is_even() -> None:
    layout = ZigzagLayout(4096, 4)
    work = []
    for rank in range(4):
        blocks = [plan_block(layout, rank, other, HeadSizes(4, 4, 8, 4)) for other in range(4)]
        tiles = [tile for block in blocks if block is not None for tile in block.tiles]
        sizes = [(t.queries.stop - t.queries.start) * (t.keys.stop - t.keys.start) for t in tiles]
        work.append(sum(size / 2 if tile.is_causal else size for size, tile in zip(sizes, tiles, strict=True)))
    assert max(work) == min(work)
    assert sum(work) == 4096**2 / 2


def test_the_fewer_bytes_are_sent() -> None:
    # Given two ranks, where rank 0's later half sees all of rank 1's keys, and all of rank 1 sees half of rank 0's
    layout = ZigzagLayout(64, 2)
    few_queries, few_keys = (
        [plan_block(layout, *pair, HeadSizes(heads, 4, 8, 4)) for heads in (4, 32)] for pair in ((0, 1), (1, 0))
    )
    # Then half of the queries are sent rather than all keys, unless they are eight times as wide
    assert [(v.queries.num_rows, v.keys.num_rows, v.pass_kv) for v in few_queries if v] == [
        (16, 32, False), (16, 32, True)
    ]  # fmt: skip
    assert [(v.queries.num_rows, v.keys.num_rows, v.pass_kv) for v in few_keys if v] == [(32, 16, True)] * 2


def test_documents_apart_have_no_blocks() -> None:
    # Given a document per chunk: only the middle of the sequence, where one rank holds two chunks, could share anything
    layout = ZigzagLayout(64, 4, tuple(range(0, 64, 8)))
    for rank in range(4):
        assert [len(step) for step in plan_ring_steps(layout, rank, HeadSizes(4, 2, 8, 4))] == [1, 0, 0, 0]


@pytest.mark.parametrize("rotary", [RotaryConfig(), RotaryConfig(percent=0.5)])
def test_packed_documents_are_the_documents_one_by_one(rotary: RotaryConfig) -> None:
    # Given the module, with positions, over three documents in one sequence
    case = Case(24, 1, document_starts=(0, 10, 11))
    attention = DistAttention(SimpleNamespace(kv_channels=case.head_dim), layer_number=1, rotary=rotary)
    q, k, v, _ = case.tensors()
    attention.sequence_attention = RingAttention(ContextShard(case.layout))
    packed = attention(q, k, v, None)
    # Then each is what it is alone
    attention.sequence_attention = DenseAttention()
    for document, out in zip((slice(0, 10), slice(10, 11), slice(11, 24)), packed.split([10, 1, 13]), strict=True):
        torch.testing.assert_close(out, attention(q[document], k[document], v[document], None), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("limit", [{"window": 4}, {"soft_cap": 2.0}])
def test_windows_and_soft_caps_are_refused(limit: dict[str, Any]) -> None:
    # Given a layer that context parallelism cannot compute
    layer = DistAttention(SimpleNamespace(kv_channels=8), layer_number=1, rotary=RotaryConfig(), **limit)
    before = layer.sequence_attention
    with pytest.raises(ConfigError, match="train this model with context_parallel 1"):
        layer.sequence_attention = RingAttention(ContextShard(ZigzagLayout(9, 1)))
    # Then it attends as it did before
    assert layer.sequence_attention is before


def test_a_shard_of_the_wrong_length_is_refused() -> None:
    q, shard = torch.zeros(5, 1, 2, 8), ContextShard(ZigzagLayout(6, 1))
    layer = DistAttention(SimpleNamespace(kv_channels=8), layer_number=1, rotary=RotaryConfig())
    layer.sequence_attention = RingAttention(shard)
    for attend in (lambda: ring_attention(q, q, q, shard, SCALE), lambda: layer(q, q, q, None)):
        with pytest.raises(ValueError, match="rank 0 holds 6 tokens"):
            attend()


@pytest.mark.parametrize("starts", [(), (1,), (0, 3, 3), (0, 5, 4), (0, 8)])
def test_documents_out_of_order_are_refused(starts: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="document_starts"):
        ZigzagLayout(8, 2, starts)
