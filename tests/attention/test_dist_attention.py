"""DistAttention with rBlocks at creditors behind real channels, against dense attention in float64."""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from megatron_distkv.attention import (
    Creditor,
    Debtor,
    DistAttention,
    ForwardContext,
    LoanTable,
    RotaryConfig,
    Verification,
    build_metadata,
    forward_context,
)
from megatron_distkv.clock import SystemClock
from megatron_distkv.errors import DistkvError, IntegrityError
from megatron_distkv.messages import Holder, MessageKind, QueryHeader, QueryShare, Scoring, StoreHeader, decode
from megatron_distkv.rblock import InstanceId, LoanId, LocalSpan, RemoteSpan, Span
from megatron_distkv.transport import (
    PROTOCOL_VERSION,
    Answer,
    Channel,
    ChannelRequest,
    Hello,
    Listener,
    TensorSpec,
    connect,
)
from tests.ops.dense import dense_attention, relative_error

H, K, D, N, L, SCALE = 4, 2, 16, 8, 3, 16**-0.5
NO_ROTARY = RotaryConfig(percent=0.0)


@dataclass
class Slice:
    start: int
    end: int
    spans: list[Span]


def attention(rotary: RotaryConfig = NO_ROTARY, **scoring: Any) -> DistAttention:
    return DistAttention(SimpleNamespace(kv_channels=D), layer_number=1, rotary=rotary, **scoring)


def pool(count: int = 16, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full((count, L, K, 2, N, D), 1e3, dtype=dtype)


class Lender:
    """A creditor with its own pool behind a real listener."""

    def __init__(self, path: Path, dtype: torch.dtype = torch.float32, num_rblocks: int = 16) -> None:
        self.pool = pool(num_rblocks, dtype)
        self.loans = LoanTable()
        self.asked: list[QueryHeader] = []
        self.creditor = Creditor(self.pool, self.loans, H, dtype, SCALE, SystemClock())
        self.address = f"unix:{path}"
        self.listener = Listener(self.address, "p", self._answer)

    def _answer(self, hello: Hello, request: ChannelRequest) -> Answer:
        kind = {
            MessageKind.QUERY: self.creditor.query,
            MessageKind.STORE: self.creditor.store,
            MessageKind.FETCH: self.creditor.fetch,
        }
        if request.kind == MessageKind.QUERY:
            self.asked.append(decode(request.header, QueryHeader))
        return kind[MessageKind(request.kind)](hello, request)

    def channel(self, debtor: str = "me") -> Channel:
        hello = Hello(PROTOCOL_VERSION, "p", debtor, 1, 0, 1 << 18, 1 << 18)
        return connect(self.address, hello, peer="lender", timeout_s=5)


@pytest.fixture
def lenders(tmp_path: Path) -> Iterator[dict[str, Lender]]:
    both = {name: Lender(tmp_path / f"{name}.sock") for name in ("x", "y")}
    yield both
    for lender in both.values():
        lender.listener.close()


def store(lender: Lender, channel: Channel, loan: str, block_ids: list[int], data: torch.Tensor) -> bytes:
    header = msgspec.msgpack.encode(StoreHeader(loan, block_ids))
    return channel.call(MessageKind.STORE, header, [data], deadline_s=5).header


class TwoRequests:
    """`a` of 45 tokens and `b` of 20, in one pool; `tables` say where their rBlocks lie."""

    def __init__(self, layer: DistAttention) -> None:
        torch.manual_seed(0)
        self.layer, self.pool = layer, pool()
        self.qkv = {name: [torch.randn(n, h, D) for h in (H, K, K)] for name, n in {"a": 45, "b": 20}.items()}
        self.tables: dict[str, list[Span]] = {
            "a": [LocalSpan(0, (3, 1, 4, 15, 9, 2))],
            "b": [LocalSpan(0, (6, 5, 8))],
        }

    def run(self, parts: dict[str, tuple[int, int]], debtor: Debtor | None) -> dict[str, torch.Tensor]:
        """One step over these positions of each; attention's output."""
        metadata = build_metadata([Slice(s, e, self.tables[name]) for name, (s, e) in parts.items()], N)
        if debtor is not None:
            debtor.begin_step(7, metadata.remote)
        packed = [torch.cat([self.qkv[name][i][s:e] for name, (s, e) in parts.items()])[:, None] for i in range(3)]
        with forward_context(ForwardContext(metadata, self.pool, debtor)):
            out = self.layer(*packed, None)
        sizes = [e - s for s, e in parts.values()]
        return dict(zip(parts, out.view(-1, H, D).split(sizes), strict=True))

    def move_out(self, lenders: dict[str, Lender], channels: dict[str, Channel], verification: Verification) -> None:
        """Nothing is left here of what goes."""
        for lender, loan, ids, local in (("x", "1", [0, 7], [3, 1]), ("y", "2", [5, 2], [4, 15]), ("y", "3", [9], [6])):
            lenders[lender].loans.grant(loan, Holder("me"), ids)
            verification.note_sent(lender, loan, ids, self.pool[local])
            store(lenders[lender], channels[lender], loan, ids, self.pool[local])
            self.pool[local] = float("nan")
        self.tables["a"] = [
            RemoteSpan(0, (0, 7), InstanceId("x"), LoanId("1")),
            RemoteSpan(2, (5, 2), InstanceId("y"), LoanId("2")),
            LocalSpan(4, (9, 2)),
        ]
        self.tables["b"] = [RemoteSpan(0, (9,), InstanceId("y"), LoanId("3")), LocalSpan(1, (5, 8))]


@pytest.mark.parametrize(
    ("rotary", "scoring"),
    [
        (NO_ROTARY, {}),
        (RotaryConfig(0.5, 100.0), {}),
        (RotaryConfig(), {}),
        (NO_ROTARY, {"window": 40}),  # a's query sees the last three tokens of x's first rBlock
        (NO_ROTARY, {"window": 21}),  # a's query sees y's second rBlock alone
        (NO_ROTARY, {"window": 14}),  # and of that one token
        (NO_ROTARY, {"window": 8}),  # only b's first rows see anything elsewhere
        (RotaryConfig(), {"window": 27, "soft_cap": 1.5, "softmax_scale": 0.7}),
        (NO_ROTARY, {"soft_cap": 2.0}),
    ],
)
def test_a_mixed_batch_over_three_holders_is_dense_attention(
    lenders: dict[str, Lender], rotary: RotaryConfig, scoring: dict[str, Any]
) -> None:
    # Given two requests whose tokens are computed in chunks, on one pool
    two = TwoRequests(attention(rotary, **scoring))
    two.run({"a": (0, 24), "b": (0, 10)}, None)
    two.run({"a": (24, 44)}, None)

    # When the first full rBlocks of `a` move to x and y, those of `b` to y
    verification = Verification(1, TensorSpec((L, K, 2, N, D), torch.float32), SCALE, 1, 5, SystemClock())
    with ExitStack() as stack:
        channels = {name: lender.channel() for name, lender in lenders.items()}
        for channel in channels.values():
            stack.callback(channel.close)
        two.move_out(lenders, channels, verification)
        debtor = Debtor(channels, 5, SystemClock(), verification=verification)
        outs = two.run({"a": (44, 45), "b": (10, 20)}, debtor)

    # Then a decode of `a` and a chunk of `b` in one step are dense attention
    assert debtor.lost == {}
    assert verification.take_wrong() == set()
    for name, (start, end) in {"a": (44, 45), "b": (10, 20)}.items():
        q, k, v = two.qkv[name]
        if rotary.percent:
            q, k = rotate(q, rotary), rotate(k, rotary)
        scale, limits = scoring.get("softmax_scale", SCALE), (scoring.get("window"), scoring.get("soft_cap"))
        expected, _ = dense_attention(q[start:end], k[:end], v[:end], torch.arange(start, end), scale, *limits)
        assert relative_error(outs[name], expected) < 1e-5
    # And creditors were asked for what some query sees, and for no more
    asked = {
        name: [share.block_ids for x in lender.asked for share in x.shares or []] for name, lender in lenders.items()
    }
    assert asked == ASKED.get(scoring.get("window"), {"x": [[0, 7]], "y": [[5, 2], [9]]})


# With a window: rBlocks that are seen. a's query is at 44, its rBlocks at x begin at 0 and 8, at y at 16 and 24; b's
# queries are at 10 to 19, its rBlock at y begins at 0.
ASKED = {
    40: {"x": [[0, 7]], "y": [[5, 2], [9]]},
    27: {"x": [], "y": [[5, 2], [9]]},
    21: {"x": [], "y": [[2], [9]]},
    14: {"x": [], "y": [[2], [9]]},
    8: {"x": [], "y": [[9]]},
}


def test_layers_of_other_windows_tell_only_what_they_see_and_once(lenders: dict[str, Lender]) -> None:
    # Given a query at 16, x's rBlock at 0 and y's at 8
    debtor, q, channels = prepared_question(lenders)
    # When layers with several windows ask
    answers = {}
    for layer, window in ((0, None), (1, 12), (2, None), (2, 12), (0, 3), (1, 3), (0, 1)):
        debtor.ask(layer, q, Scoring(window=window))
        answers[layer, window] = len(debtor.answers())
    # Then only those who have something to say were asked, and each heard of its rBlocks once for each window
    assert list(answers.values()) == [2, 2, 2, 2, 1, 1, 0]
    told = {name: [x.scoring.window for x in lender.asked if x.shares] for name, lender in lenders.items()}
    assert told == {"x": [None, 12], "y": [None, 12, 3]}
    assert debtor.lost == {}
    for channel in channels:
        channel.close()


@pytest.mark.parametrize(
    ("share", "sentence"),
    [
        (QueryShare(["loan-0"], [3], 1), "0 positions for 1 rBlocks of a window"),
        (QueryShare(["loan-0"], [3], 1, [0, 8]), "2 positions for 1 rBlocks of a window"),
    ],
)
def test_a_window_without_positions_is_refused(lenders: dict[str, Lender], share: QueryShare, sentence: str) -> None:
    _, q, channels = prepared_question(lenders)
    header = QueryHeader(1, 0, [share], Scoring(window=5))
    with pytest.raises(DistkvError, match=sentence):
        channels[0].call(MessageKind.QUERY, msgspec.msgpack.encode(header), [q], deadline_s=5)
    for channel in channels:
        channel.close()


@pytest.mark.parametrize(
    "scoring", [Scoring(window=0), Scoring(window=1 << 40), Scoring(soft_cap=-1.0), Scoring(scale=float("nan"))]
)
def test_scores_that_nobody_can_make_are_refused(lenders: dict[str, Lender], scoring: Scoring) -> None:
    _, q, channels = prepared_question(lenders)
    header = msgspec.msgpack.encode(QueryHeader(1, 0, [QueryShare(["loan-0"], [3], 1, [0], 8)], scoring))
    with pytest.raises(DistkvError, match="a QueryHeader cannot be read"):
        channels[0].call(MessageKind.QUERY, header, [q], deadline_s=5)
    for channel in channels:
        channel.close()


def test_a_creditor_remembers_no_more_ways_of_scoring_than_there_are_layers(lenders: dict[str, Lender]) -> None:
    _, q, channels = prepared_question(lenders)
    share = QueryShare(["loan-0"], [3], 1, [0], 8)
    for window in range(8, 8 + L + 1):
        header = msgspec.msgpack.encode(QueryHeader(1, 0, [share], Scoring(window=window)))
        if window < 8 + L:
            channels[0].call(MessageKind.QUERY, header, [q], deadline_s=5)
        else:
            with pytest.raises(DistkvError, match=f"{L + 1} ways of scoring in {L} layers"):
                channels[0].call(MessageKind.QUERY, header, [q], deadline_s=5)
    for channel in channels:
        channel.close()


def rotate(x: torch.Tensor, rotary: RotaryConfig) -> torch.Tensor:
    """RoPE by complex numbers, in float64."""
    r = rotary.rotated_dims(D)
    angles = torch.outer(torch.arange(len(x)).double(), rotary.base ** (-torch.arange(0, r, 2).double() / r))
    turned = torch.complex(x[..., : r // 2].double(), x[..., r // 2 : r].double()) * torch.exp(1j * angles)[:, None]
    return torch.cat((turned.real, turned.imag, x[..., r:].double()), -1)


@pytest.mark.parametrize(
    ("rotary", "scoring"),
    [
        (NO_ROTARY, {}),
        (RotaryConfig(0.5, 100.0), {}),
        (NO_ROTARY, {"window": 4}),
        (NO_ROTARY, {"window": 9, "soft_cap": 1.5}),
        (RotaryConfig(), {"window": 3, "soft_cap": 1.5, "softmax_scale": 0.7}),
    ],
)
def test_without_a_context_it_is_dense_and_differentiable(rotary: RotaryConfig, scoring: dict[str, Any]) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(9, 2, h, D, requires_grad=True) for h in (H, K, K))
    out = attention(rotary, **scoring)(q, k, v, None)
    scale, window, soft_cap = scoring.get("softmax_scale", SCALE), scoring.get("window"), scoring.get("soft_cap")
    for b in range(2):
        qb, kb = (rotate(x[:, b].detach(), rotary) if rotary.percent else x[:, b] for x in (q, k))
        expected, _ = dense_attention(qb, kb, v[:, b], torch.arange(9), scale, window, soft_cap)
        assert relative_error(out[:, b].view(9, H, D), expected) < 1e-5
    out.sum().backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in (q, v))


def prepared_question(lenders: dict[str, Lender], debtor_name: str = "me") -> tuple[Debtor, torch.Tensor, list]:
    """A one-token question to x and y about one rBlock each."""
    channels = {name: lender.channel(debtor_name) for name, lender in lenders.items()}
    for index, lender in enumerate(lenders.values()):
        lender.loans.grant(f"loan-{index}", Holder("me"), [3])
        me = lender.channel()
        store(lender, me, f"loan-{index}", [3], torch.randn(lender.pool[:1].shape))
        me.close()
    spans: list[Span] = [
        RemoteSpan(0, (3,), InstanceId("x"), LoanId("loan-0")),
        RemoteSpan(1, (3,), InstanceId("y"), LoanId("loan-1")),
        LocalSpan(2, (0,)),
    ]
    debtor = Debtor(channels, 0.5, SystemClock())
    metadata = build_metadata([Slice(16, 17, spans)], N)
    debtor.begin_step(1, metadata.remote)
    return debtor, torch.randn(1, H, D), list(channels.values())


def test_a_lost_creditor_is_noted_and_the_other_still_answers(lenders: dict[str, Lender]) -> None:
    debtor, q, channels = prepared_question(lenders)
    channels[0].close()
    debtor.ask(0, q)
    assert len(debtor.answers()) == 1
    assert set(debtor.lost) == {"x"}
    for channel in channels:
        channel.close()


def test_a_query_for_anothers_rblocks_is_refused(lenders: dict[str, Lender]) -> None:
    # Given loans of `me`, and a thief who knows their ids
    debtor, q, channels = prepared_question(lenders, debtor_name="thief")
    debtor.ask(0, q)
    assert debtor.answers() == []
    assert all("unknown_loan" in reason for reason in debtor.lost.values())
    for channel in channels:
        channel.close()


def test_after_a_revocation_nothing_is_read_and_nothing_written(lenders: dict[str, Lender]) -> None:
    debtor, q, channels = prepared_question(lenders)
    debtor.ask(0, q)
    assert len(debtor.answers()) == 2
    lenders["x"].loans.revoke("loan-0")
    before = lenders["x"].pool.clone()
    debtor.ask(0, q)
    assert len(debtor.answers()) == 1
    assert b"unknown_loan" in store(lenders["x"], channels[0], "loan-0", [3], torch.zeros(1, L, K, 2, N, D))
    assert torch.equal(lenders["x"].pool, before)
    for channel in channels:
        channel.close()


def test_contexts_do_not_nest_and_end_with_an_error() -> None:
    context = ForwardContext(build_metadata([], N), pool())
    with pytest.raises(RuntimeError, match="already running"), forward_context(context), forward_context(context):
        pass
    with forward_context(context):
        pass


def test_a_new_token_without_a_local_rblock_is_a_bug() -> None:
    with pytest.raises(IntegrityError, match="position 8"):
        build_metadata([Slice(7, 9, [LocalSpan(0, (1,))])], N)


def test_half_precision_wire_is_within_its_rounding(tmp_path: Path) -> None:
    lender = Lender(tmp_path / "h.sock", torch.bfloat16)
    torch.manual_seed(0)
    data = torch.randn(1, L, K, 2, N, D).to(torch.bfloat16)
    lender.loans.grant("1", Holder("me"), [2])
    channel = lender.channel()
    store(lender, channel, "1", [2], data)
    debtor = Debtor({"x": channel}, 5, SystemClock())
    spans: list[Span] = [RemoteSpan(0, (2,), InstanceId("x"), LoanId("1")), LocalSpan(1, (0,))]
    debtor.begin_step(0, build_metadata([Slice(N, N + 1, spans)], N).remote)
    q = torch.randn(1, H, D).to(torch.bfloat16)
    debtor.ask(0, q)
    (partial,) = debtor.answers()
    k, v = (data[0, 0, :, i].transpose(0, 1) for i in (0, 1))
    expected, lse = dense_attention(q, k, v, torch.tensor([N]), SCALE)
    assert relative_error(partial.out_RHD, expected) < 1e-3
    assert (partial.lse_RH - lse).abs().max() < 1e-4
    channel.close()
    lender.listener.close()
    assert not os.path.exists(tmp_path / "h.sock")
