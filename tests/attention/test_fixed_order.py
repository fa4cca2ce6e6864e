"""Attention in fixed order: the bits do not depend on where rBlocks lie, nor on how questions are cut."""

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from megatron_distkv.attention import (
    Debtor,
    DistAttention,
    FixedAttention,
    ForwardContext,
    HostMemory,
    RotaryConfig,
    build_metadata,
    forward_context,
)
from megatron_distkv.attention.fixed_order import plan
from megatron_distkv.attention.fixed_order.fixed_attention import OwnKeys
from megatron_distkv.attention.fixed_order.kept_plans import KeptPlans
from megatron_distkv.attention.fixed_order.tree import FAN_IN, Node, cover
from megatron_distkv.clock import SystemClock
from megatron_distkv.errors import DistkvError
from megatron_distkv.messages import Holder, MessageKind, QueryHeader, QueryShare, Scoring
from megatron_distkv.rblock import HOST, HOST_LOAN, InstanceId, LoanId, LocalSpan, RemoteSpan, Span
from megatron_distkv.transport import Channel
from tests.attention.test_dist_attention import SCALE, D, H, K, L, Lender, N, Slice, attention
from tests.ops.dense import dense_attention, relative_error

LENGTHS = {"a": 75 * N + 3, "b": 20, "c": 9 * N}
# Chunks of a batch: some rows of each request, the last ones.
ROWS = {"a": 11, "b": 3, "c": 1}
PLACES = ("here", HOST, "x", "y")
Placing = Callable[[int], str]


def in_runs(of: int, first: int) -> Placing:
    """So many rBlocks at one holder, the next ones at the next."""
    return lambda i: PLACES[(i // of + first) % len(PLACES)]


class Unrounded(FixedAttention):
    """Keeps what it has computed, before the layer rounds it to the model's dtype."""

    out_THD: torch.Tensor

    def attend(self, q_THD: torch.Tensor, own: OwnKeys, scale: float, scoring: Scoring) -> torch.Tensor:
        self.out_THD = super().attend(q_THD, own, scale, scoring)
        return self.out_THD


class World:
    """Requests whose rBlocks lie wherever they are put, at four holders with a pool each, and their K and V."""

    def __init__(self, stack: ExitStack, folder: Path, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.dtype = dtype
        self.qkv = {r: [torch.randn(n, h, D).to(dtype) for h in (H, K, K)] for r, n in LENGTHS.items()}
        self.lenders = {name: Lender(folder / f"{name}.sock", dtype, 128) for name in ("x", "y")}
        self.pools = {name: torch.zeros(128, L, K, 2, N, D, dtype=dtype) for name in ("here", HOST)}
        self.channels: dict[str, Channel] = {}
        for name, lender in self.lenders.items():
            self.pools[name] = lender.pool
            lender.loans.grant("loan", Holder("me"), list(range(128)))
            lender.loans.note_stored("loan", list(range(128)), slice(0, K), K)  # by the tests themselves
            stack.callback(lender.listener.close)
            self.channels[name] = lender.channel()
            stack.callback(self.channels[name].close)
        self.debtor = Debtor(self.channels, 5, SystemClock(), HostMemory(self.pools[HOST], SCALE))
        self.step = 0

    def attend(
        self, layer: DistAttention, placing: Placing, rows: dict[str, int] = ROWS, answers: int = 512
    ) -> dict[str, torch.Tensor]:
        self.step += 1
        free = {name: random.Random(self.step).sample(range(128), 128) for name in PLACES}
        slices = []
        for request, count in rows.items():
            length = LENGTHS[request]
            spans = [self._put(request, i, length - count, placing, free) for i in range(-(-length // N))]
            slices.append(Slice(length - count, length, spans))
        metadata = build_metadata(slices, N)
        self.debtor.begin_step(self.step, metadata.remote)
        fixed = Unrounded(self.debtor, N, answers)
        fixed.begin_step(self.step, slices)
        packed = [torch.cat([self.qkv[r][i][-count:] for r, count in rows.items()])[:, None] for i in range(3)]
        context = ForwardContext(metadata, self.pools["here"], self.debtor, fixed)
        with forward_context(context):
            rounded = layer(*packed, None)
        assert torch.equal(rounded.view_as(fixed.out_THD), fixed.out_THD.to(self.dtype))
        assert self.debtor.lost == {}
        return dict(zip(rows, fixed.out_THD.split(list(rows.values())), strict=True))

    def _put(self, request: str, i: int, first_new: int, placing: Placing, free: dict[str, list[int]]) -> Span:
        is_new = (i + 1) * N > first_new
        name = "here" if is_new else placing(i)
        block = free[name].pop()
        kv = torch.zeros(2, K, N, D, dtype=self.dtype)
        for part in (0, 1):
            some = self.qkv[request][1 + part][i * N : (i + 1) * N].transpose(0, 1)
            kv[part, :, : some.shape[1]] = some
        self.pools[name][block] = kv.transpose(0, 1)
        if name == "here":
            return LocalSpan(i, (block,))
        loan = HOST_LOAN if name == HOST else LoanId("loan")
        return RemoteSpan(i, (block,), InstanceId(name), loan)


@pytest.fixture
def world(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[World]:
    with ExitStack() as stack:
        yield World(stack, tmp_path, getattr(request, "param", torch.float32))


@pytest.mark.parametrize("world", [torch.float32, torch.bfloat16], indirect=True, ids=str)
@pytest.mark.parametrize("scoring", [{}, {"window": 40}, {"window": 333, "soft_cap": 1.5, "softmax_scale": 0.7}])
def test_bits_do_not_depend_on_places(world: World, scoring: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    # Given all rBlocks here, and attention that is right
    layer = attention(RotaryConfig(percent=0.0), **scoring)
    expected = world.attend(layer, lambda i: "here")
    for request, (q, k, v) in world.qkv.items():
        count, length = ROWS[request], LENGTHS[request]
        window, soft_cap = scoring.get("window"), scoring.get("soft_cap")
        positions = torch.arange(length - count, length)
        dense, _ = dense_attention(q[-count:], k, v, positions, layer.scale, window, soft_cap)
        assert relative_error(expected[request], dense) < (1e-5 if world.dtype == torch.float32 else 4e-3)

    # When they lie anywhere, are computed with others or alone, a few rows at a time, in small questions
    found = [world.attend(layer, in_runs(of, first=of)) for of in (1, 21)]
    found.append(world.attend(layer, in_runs(3, first=2), {"a": 1, "c": 1}))
    monkeypatch.setattr(plan, "MOST_PARTIALS", 100)
    found.append(world.attend(layer, in_runs(19, first=3), answers=7))

    # Then not a bit differs
    for outs in found:
        for request, out in outs.items():
            assert torch.equal(out, expected[request][-len(out) :])


def test_whole_nodes_travel_as_one() -> None:
    # Given a run of rBlocks with a hole at the end, and one further on
    leaves = [*range(3, 2 * FAN_IN**2 + 3), 500]
    nodes = cover(leaves)
    # Then every leaf is under exactly one node, and the whole ones in the middle are as high as can be
    assert [leaf for node in nodes for leaf in node.leaves] == leaves
    assert Node(2, 1) in nodes
    assert len(nodes) == 5 + 7 + 1 + 3 + 1


def test_a_question_that_no_debtor_asks_is_refused(world: World) -> None:
    share, twice = QueryShare(["loan"], [1, 2], 2, [0, N], 5 * N), QueryShare(["loan"], [1, 2], 1, [0, 0], 5 * N)
    for shares, count, why in (
        ([share], 3, "3 partials are expected"),
        ([twice], 2, "each rBlock's own position"),
        ([share] * 2000, 8000, "8000 pairs of queries and rBlocks"),
    ):
        header = msgspec.msgpack.encode(QueryHeader(1, 0, shares, Scoring(), 0, count))
        with pytest.raises(DistkvError, match=why):
            world.channels["x"].call(MessageKind.QUERY, header, deadline_s=5)


def test_a_kept_plan_is_the_one_that_would_be_made() -> None:
    # Given requests that decode, one of them over rBlocks of others and another's first tokens
    kept = KeptPlans(N, most_answers=7)

    def spans(length: int) -> list[Span]:
        num_local = (length - 1) // N - 4
        return [
            RemoteSpan(0, (5, 6, 7), InstanceId("x"), LoanId("x.1")),
            RemoteSpan(3, (8, 9), HOST, HOST_LOAN),
            LocalSpan(5, tuple(range(num_local))),
        ]

    num_kept = 0
    last: dict[int | None, object] = {}  # by window
    for step in range(4 * N):
        # When they go on, token by token
        slices = [Slice(n + step, n + step + 1, spans(n + step + 1)) for n in (5 * N + 3, 9 * N)]
        places = [{piece.start // N: number} for number, piece in enumerate(slices)] if step > N else None
        for window in (None, 3 * N + 3):
            got = kept.blocks(slices, window, places)
            num_kept += got[0].merges is last.get(window)
            last[window] = got[0].merges
            # Then each step has the plan that is made for it alone
            assert [parts_of(block) for block in got] == [
                parts_of(block) for block in plan.plan_blocks(slices, N, window, most_answers=7, open_places=places)
            ]
    assert num_kept > 4 * N


def parts_of(part: object) -> object:
    """Tensors as lists."""
    if isinstance(part, torch.Tensor):
        return part.tolist()
    return [parts_of(x) for x in part] if isinstance(part, list | tuple) else repr(part)
