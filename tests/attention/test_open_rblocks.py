"""A pool in int8: a query sees its own rBlock as computed and all earlier ones in int8, however the steps were cut."""

import random
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_distkv.attention import NewKeys, OpenRBlocks
from megatron_distkv.attention.open_index import open_index
from megatron_distkv.errors import IntegrityError
from megatron_distkv.kvcache.rblock_pool import rank_pool
from megatron_distkv.kvcache.rblock_shape import RBlockShape
from megatron_distkv.messages import Scoring
from megatron_distkv.ops import quantize_rblocks
from megatron_distkv.rblock import LocalSpan, RemoteSpan, Span
from tests.ops.dense import dense_attention, relative_error

L, K, H, N, D = 2, 2, 4, 4, 16
SCALE = D**-0.5
SHAPE = RBlockShape(L, H, K, D, N, "fp32", kv_dtype="int8")


class Piece(NamedTuple):
    start: int
    end: int
    spans: list[Span]
    open_slot: int | None


class Prompt:
    """A request's q, k and v in all layers, and where its rBlocks lie in a pool that others use too."""

    def __init__(self, num_tokens: int, slot: int, block_ids: list[int]) -> None:
        self.slot, self.num_tokens, self.block_ids = slot, num_tokens, block_ids
        self.q = torch.randn(L, num_tokens, H, D)
        self.k, self.v = torch.randn(2, L, num_tokens, K, D).unbind()

    def piece(self, start: int, end: int) -> Piece:
        return Piece(start, end, [LocalSpan(0, tuple(self.block_ids[: -(-end // N)]))], self.slot)

    def expected(self, layer: int, scoring: Scoring) -> torch.Tensor:
        """Query by query, in float64."""
        k, v = self.k[layer].clone(), self.v[layer].clone()
        outs = []
        for t in range(self.num_tokens):
            if t and t % N == 0:
                rows = slice(t - N, t)
                rblock = torch.stack([self.k[layer, rows], self.v[layer, rows]]).permute(2, 0, 1, 3)[None, None]
                int8, k_scales, v_scales = quantize_rblocks(rblock)
                k[rows] = (int8[0, 0, :, 0] * k_scales[0, 0, :, None]).transpose(0, 1)
                v[rows] = (int8[0, 0, :, 1] * v_scales[0, 0, ..., None]).transpose(0, 1)
            limits = {"window": scoring.window, "soft_cap": scoring.soft_cap}
            q, position = self.q[layer, t : t + 1], torch.tensor([t])
            outs.append(dense_attention(q, k[: t + 1], v[: t + 1], position, SCALE, **limits)[0])
        return torch.cat(outs)


def run(prompts: list[Prompt], steps: list[list[tuple[int, int, int]]], scoring: Scoring) -> list[torch.Tensor]:
    """Steps of (prompt, start, end); returns each prompt's outs `[L, T, H, D]`."""
    slots_OLK2ND = torch.full((4, L, K, 2, N, D), float("nan"))
    rblocks = OpenRBlocks(rank_pool(SHAPE, 24).tensor_BLK2ND, slots_OLK2ND)
    outs = [torch.full((L, x.num_tokens, H, D), float("nan")) for x in prompts]
    for step in steps:
        rblocks.begin_step([prompts[x].piece(start, end) for x, start, end in step])
        positions_T = torch.cat([torch.arange(start, end) for _, start, end in step])
        for layer in range(L):
            q, k, v = (
                torch.cat([getattr(prompts[x], name)[layer, start:end] for x, start, end in step]) for name in "qkv"
            )
            out, _ = rblocks.attend(layer, q, NewKeys(k, v), positions_T, SCALE, scoring)
            for x, start, end in step:
                outs[x][layer, start:end], out = out[: end - start], out[end - start :]
    return outs


def cut_at_random(prompts: list[Prompt], rng: random.Random) -> Iterator[list[tuple[int, int, int]]]:
    done = [0] * len(prompts)
    while any(done[x] < prompts[x].num_tokens for x in range(len(prompts))):
        step = []
        for x, prompt in enumerate(prompts):
            end = min(prompt.num_tokens, done[x] + rng.choice([0, 1, 1, 3, 9]))
            if done[x] < end:
                step.append((x, done[x], end))
                done[x] = end
        if step:
            yield step


@pytest.mark.parametrize("scoring", [Scoring(), Scoring(window=6, soft_cap=5.0)], ids=["plain", "window"])
@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 25), min_size=1, max_size=3), seed=st.integers(0, 1 << 20))
def test_however_prompts_are_cut_a_query_sees_the_same(scoring: Scoring, lengths: list[int], seed: int) -> None:
    # Given requests whose rBlocks are scattered, in slots that held something else
    torch.manual_seed(seed)
    rng = random.Random(seed)
    free, slots = rng.sample(range(24), 24), rng.sample(range(4), 4)
    prompts = [Prompt(length, slots.pop(), [free.pop() for _ in range(-(-length // N))]) for length in lengths]

    # When they are computed in steps of any sizes, beside each other
    outs = run(prompts, list(cut_at_random(prompts, rng)), scoring)

    # Then every query saw its own rBlock as it was, and what came before in int8
    for prompt, out in zip(prompts, outs, strict=True):
        for layer in range(L):
            assert relative_error(out[layer], prompt.expected(layer, scoring)) < 1e-3


def test_kv_that_is_computed_again_is_seen_as_before() -> None:
    # Given a request of which all but the first rBlock is lost, the open one with it
    torch.manual_seed(0)
    prompt = Prompt(15, 2, [7, 3, 9, 1])
    once = run([prompt], [[(0, 0, 15)]], Scoring())[0]
    # When it is computed again from there, in other steps
    again = run([prompt], [[(0, 0, 13)], [(0, 4, 6)], [(0, 6, 14)], [(0, 14, 15)]], Scoring())[0]
    # Then no query sees anything else
    assert relative_error(again, once) < 1e-5


def test_a_token_without_a_slot_or_without_an_rblock_is_refused() -> None:
    rblocks = OpenRBlocks(rank_pool(SHAPE, 4).tensor_BLK2ND, torch.zeros(1, L, K, 2, N, D))
    for piece in (Piece(3, 5, [LocalSpan(0, (1,))], 0), Piece(0, 2, [LocalSpan(0, (1,))], None)):
        with pytest.raises(IntegrityError, match="no local rBlock, or no slot"):
            rblocks.begin_step([piece])


def test_what_lies_with_creditors_is_not_listed() -> None:
    # Given a request whose rBlocks 1 and 2 lie elsewhere, and one that decodes beside it
    spans = [LocalSpan(0, (9,)), RemoteSpan(1, (9, 8), "c", "loan"), LocalSpan(3, (5, 7, 2))]
    other = Piece(6, 7, [LocalSpan(0, (4, 6))], 3)
    # When tokens from the middle of rBlock 4 into rBlock 5 are computed
    index = open_index([Piece(18, 21, spans, 1), other], N)
    # Then each rBlock sees the local ones before it, at the positions that they hold
    assert index.past.cu_blocks.tolist() == [0, 2, 5, 6]
    assert index.past.block_ids_M.tolist() == [9, 5, 9, 5, 7, 4]
    assert index.past.block_starts_M.tolist() == [0, 12, 0, 12, 16, 0]
    assert index.own.block_starts_M.tolist() == [16, 20, 4]
    assert index.places == [{4: 0, 5: 1}, {1: 2}]
    assert index.cu_queries.tolist() == [0, 2, 3, 4]
    pairs = [[x.tolist() for x in pair] for pair in (index.filled, index.begun, index.left_open)]
    assert pairs == [[[0], [7]], [[0, 2], [1, 3]], [[1, 2], [1, 3]]]
    # And tokens of an rBlock that lies elsewhere are refused
    with pytest.raises(IntegrityError, match="no local rBlock"):
        open_index([Piece(11, 13, spans, 1)], N)
