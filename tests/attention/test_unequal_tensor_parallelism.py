"""Debtors and creditors of different tensor parallelism: every rank asks those that hold its heads, for those heads."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, TypeAlias

import msgspec
import pytest
import torch

from megatron_distkv.attention import Creditor, Debtor, HeadShare, LoanTable, RemoteShare
from megatron_distkv.attention.verification import Question
from megatron_distkv.clock import SystemClock
from megatron_distkv.errors import PeerLost
from megatron_distkv.kvcache.rblock_pool import rank_pool
from megatron_distkv.kvcache.rblock_shape import RBlockShape
from megatron_distkv.messages import Acknowledge, FetchHeader, Holder, MessageKind, QueryHeader, QueryShare, StoreHeader
from megatron_distkv.ops import pack_rblocks
from megatron_distkv.peers import MailboxSizes, Peers
from megatron_distkv.pool import Identity, Peer
from megatron_distkv.rblock import InstanceId
from megatron_distkv.transport import (
    PROTOCOL_VERSION,
    Answer,
    ChannelRequest,
    Hello,
    Listener,
    TensorSpec,
    connect,
    read_tensors,
)
from megatron_distkv.transport.channel import RequestFailed
from tests.ops.dense import dense_attention, relative_error

KVDtype: TypeAlias = Literal["auto", "int8"]
L, K, H, N, D = 2, 6, 12, 4, 8
SCALE = D**-0.5
IDS = [5, 0, 3]
SIZES = MailboxSizes(1 << 18, 1 << 18)


class CreditorRanks:
    """An instance of `num_ranks` ranks that grants IDS to the debtor."""

    def __init__(self, directory: Path, num_ranks: int, kv_dtype: KVDtype = "auto") -> None:
        self.kv_dtype: KVDtype = kv_dtype
        self.address = f"unix:{directory}/c{num_ranks}.{{rank}}.sock ranks:{num_ranks}"
        self.loans = [LoanTable() for _ in range(num_ranks)]
        for loans in self.loans:
            loans.grant("loan", Holder("me"), IDS)
        self.asked: list[tuple[int, MessageKind]] = []
        self.listeners = [self._listen(directory, rank, num_ranks) for rank in range(num_ranks)]

    def _listen(self, directory: Path, rank: int, num_ranks: int) -> Listener:
        pool = rank_pool(shape(num_ranks, self.kv_dtype), 8).tensor_BLK2ND
        creditor = Creditor(
            pool, self.loans[rank], H // num_ranks, torch.float32, SCALE, SystemClock(),
            rank=rank, num_ranks=num_ranks, head_dim=D,
        )  # fmt: skip

        def answer(hello: Hello, request: ChannelRequest) -> Answer:
            kind = MessageKind(request.kind)
            self.asked.append((rank, kind))
            if kind is MessageKind.RELEASE:
                return Answer(msgspec.msgpack.encode(Acknowledge()))
            return {
                MessageKind.QUERY: creditor.query,
                MessageKind.STORE: creditor.store,
                MessageKind.FETCH: creditor.fetch,
            }[kind](hello, request)

        return Listener(f"unix:{directory}/c{num_ranks}.{rank}.sock", "p", answer)

    def close(self) -> None:
        for listener in self.listeners:
            listener.close()


Start = Callable[..., CreditorRanks]


def shape(num_ranks: int, kv_dtype: KVDtype = "auto") -> RBlockShape:
    return RBlockShape(L, H, K, D, N, "fp32", num_ranks, kv_dtype)


def peers(rank: int, num_ranks: int, kv_dtype: KVDtype = "auto") -> Peers:
    return Peers("p", Identity(InstanceId("me")), SystemClock(), rank, SIZES, 5.0, shape=shape(num_ranks, kv_dtype))


def heads_of(rank: int, num_ranks: int, num_heads: int) -> slice:
    return slice(rank * num_heads // num_ranks, (rank + 1) * num_heads // num_ranks)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[CreditorRanks] = []

    def start(num_ranks: int, kv_dtype: KVDtype = "auto") -> CreditorRanks:
        started.append(CreditorRanks(tmp_path, num_ranks, kv_dtype))
        return started[-1]

    yield start
    for creditor in started:
        creditor.close()


@pytest.mark.parametrize(("debtors", "creditors"), [(1, 1), (2, 1), (1, 2), (2, 2), (2, 3), (3, 2), (1, 6), (6, 1)])
@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_what_ranks_of_any_number_store_they_ask_and_fetch(
    kv_dtype: KVDtype, debtors: int, creditors: int, start: Start
) -> None:
    # Given the KV of three rBlocks, of which every rank of the debtor has its heads
    torch.manual_seed(0)
    creditor = start(creditors, kv_dtype)
    kv_MLK2ND, q_THD = torch.randn(len(IDS), L, K, 2, N, D), torch.randn(5, H, D)
    sent = kv_MLK2ND if kv_dtype == "auto" else pack_rblocks(kv_MLK2ND)
    outs = torch.full((L, 5, H, D), float("nan"))
    lent = {rank: peers(rank, debtors, kv_dtype) for rank in range(debtors)}

    # When all ranks store, and then each asks for every layer
    for rank, mine in lent.items():
        channel = mine.reach(Peer("c", 1, creditor.address))
        data = sent[:, :, heads_of(rank, debtors, K)].contiguous()
        channel.call(MessageKind.STORE, msgspec.msgpack.encode(StoreHeader("loan", IDS)), [data], deadline_s=5)
    for rank, mine in lent.items():
        debtor, rows = Debtor(mine, 5, SystemClock()), heads_of(rank, debtors, H)
        debtor.begin_step(1, {"c": RemoteShare(torch.arange(5), [QueryShare(["loan"], IDS, 5)])})
        for layer in range(L):
            debtor.ask(layer, q_THD[:, rows])
            (partial,) = debtor.answers()
            outs[layer][:, rows] = partial.out_RHD
        assert debtor.lost == {}

    # Then the answers together are dense attention
    for layer in range(L):
        k, v = (kv_MLK2ND[:, layer, :, i].transpose(1, 2).reshape(-1, K, D) for i in (0, 1))
        expected, _ = dense_attention(q_THD, k, v, torch.full((5,), len(IDS) * N), SCALE)
        assert relative_error(outs[layer], expected) < (1e-5 if kv_dtype == "auto" else 5e-2)

    # And what comes back is what was sent, bit by bit
    for rank, mine in lent.items():
        header = msgspec.msgpack.encode(FetchHeader("loan", IDS))
        reply = mine["c"].call(MessageKind.FETCH, header, deadline_s=5)
        expected = sent[:, :, heads_of(rank, debtors, K)]
        (data,) = read_tensors(reply.payload, [TensorSpec(tuple(expected.shape), expected.dtype)])
        assert torch.equal(data, expected)
        mine.close()


def test_loans_are_the_leaders_business(start: Start) -> None:
    creditor = start(2)
    mine = peers(0, 1)
    mine.reach(Peer("c", 1, creditor.address)).call(MessageKind.RELEASE, b"", deadline_s=5)
    assert creditor.asked == [(0, MessageKind.RELEASE)]
    mine.close()


def test_one_lost_rank_is_the_whole_creditor(start: Start) -> None:
    # Given a debtor of one rank that has stored at two
    creditor, mine = start(2), peers(0, 1)
    channel = mine.reach(Peer("c", 1, creditor.address))
    # When one of them goes away
    creditor.listeners[1].close()
    # Then the creditor is lost, and no answer of the other is taken for a later question
    with pytest.raises(PeerLost):
        channel.call(MessageKind.FETCH, msgspec.msgpack.encode(FetchHeader("loan", IDS)), deadline_s=5)
    assert not channel.is_open
    mine.close()


def test_a_refusal_of_one_rank_is_that_of_all(start: Start) -> None:
    creditor, mine = start(2), peers(0, 1)
    channel = mine.reach(Peer("c", 1, creditor.address))
    reply = channel.call(MessageKind.FETCH, msgspec.msgpack.encode(FetchHeader("another", IDS)), deadline_s=5)
    assert msgspec.msgpack.decode(reply.header, type=Acknowledge).refusal == "unknown_loan"
    mine.close()


@pytest.mark.parametrize("num_ranks", [4, 5])
def test_ranks_that_cannot_share_the_heads_are_no_peers(num_ranks: int, start: Start) -> None:
    creditor = start(2)
    with pytest.raises(PeerLost, match="cannot share 6 KV heads"):
        peers(0, 1).reach(Peer("c", 1, creditor.address.replace("ranks:2", f"ranks:{num_ranks}")))


@pytest.mark.parametrize("wrong", [(2, 2), (0, 4), (5, 5), (1, 2)])
def test_a_rank_that_has_no_heads_there_gets_an_error(wrong: tuple[int, int], start: Start) -> None:
    # Given the first of two ranks, which hold 3 of 6 heads each
    creditor = start(2)
    hello = Hello(PROTOCOL_VERSION, "p", "me", 1, wrong[0], 1 << 16, 1 << 16, num_ranks=wrong[1])
    channel = connect(creditor.address, hello, peer="c", timeout_s=5)
    with pytest.raises(RequestFailed, match=r"has no (part of|KV heads)"):
        channel.call(MessageKind.FETCH, msgspec.msgpack.encode(FetchHeader("loan", IDS)), deadline_s=5)
    channel.close()


def test_common_heads_are_what_both_hold() -> None:
    for mine_of, theirs_of in ((2, 1), (1, 2), (2, 3), (3, 2), (6, 3)):
        for rank in range(mine_of):
            mine = HeadShare(rank, mine_of, K)
            found = []
            for other in range(theirs_of):
                common = mine.common_with(HeadShare(other, theirs_of, K))
                found += [mine.heads[i] for i in range(common.start, common.stop)]
            assert found == list(mine.heads)


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_in_fixed_order_no_bit_depends_on_the_ranks(kv_dtype: KVDtype, start: Start) -> None:
    # Given KV at creditors of one, two and three ranks
    torch.manual_seed(0)
    kv_MLK2ND, q_THD = torch.randn(len(IDS), L, K, 2, N, D), torch.randn(5, H, D)
    kv = pack_rblocks(kv_MLK2ND) if kv_dtype == "int8" else kv_MLK2ND
    share = QueryShare(["loan"], IDS, 5, [i * N for i in range(3)], 3 * N)
    found = []
    for debtors, creditors in ((1, 1), (2, 1), (1, 2), (2, 3)):
        creditor = start(creditors, kv_dtype)
        whole = torch.full((3 * 5, H, D), float("nan"))
        for rank in range(debtors):
            mine, heads = peers(rank, debtors, kv_dtype), heads_of(rank, debtors, H)
            data = kv[:, :, heads_of(rank, debtors, K)].contiguous()
            header = msgspec.msgpack.encode(StoreHeader("loan", IDS))
            mine.reach(Peer("c", 1, creditor.address)).call(MessageKind.STORE, header, [data], deadline_s=5)

            # When each rank of a debtor asks for partials in fixed order
            debtor = Debtor(mine, 5, SystemClock())
            debtor.begin_step(1, {"c": RemoteShare(torch.arange(5), [share])})
            assert debtor.post("c", QueryHeader(1, 1, [share], num_partials=15), q_THD[:, heads])
            answer = debtor.partials_of(Question("c", 1, q_THD[:, heads], [share], torch.float32, num_partials=15))
            assert answer is not None
            whole[:, heads] = answer[0]
            mine.close()
        creditor.close()
        found.append(whole)

    # Then they are the same, whoever has which heads
    assert all(torch.equal(whole, found[0]) for whole in found)
