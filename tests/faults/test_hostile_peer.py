"""A member of the pool that says anything at all to a real instance: nothing foreign is read or written, and it serves.

The victim lends four rBlocks to an honest debtor. Whatever somebody else says, those rBlocks, the victim's accounts and
the answers to the honest debtor stay what they are.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_distkv.config.instance import InstanceConfig
from megatron_distkv.engine.llm import LLM
from megatron_distkv.ledger import DebtLedger
from megatron_distkv.ledger.embedded_server import EmbeddedServer
from megatron_distkv.ledger.opening import open_ledger
from megatron_distkv.messages import (
    Acknowledge,
    LendHeader,
    LendReply,
    MessageKind,
    QueryHeader,
    QueryShare,
    StoreHeader,
    decode,
)
from megatron_distkv.rblock import InstanceId, LoanId, loan_key
from megatron_distkv.transport import Channel, connect
from megatron_distkv.transport.frame import ERROR_KIND, FRAME_BYTES, Frame, aligned, unpack
from tests.faults.hostile import DEEP, anything, messages, numbers, pack, wild
from tests.transport.raw_peer import RawPeer, hello

LEASE_S = 600.0
LOAN = "honest.1.1.unguessable"
NUM_LENT = 4
REQUEST_BYTES = 1 << 20


class Victim:
    def __init__(self, llm: LLM, ledger: DebtLedger) -> None:
        self.instance = llm.instance
        rank = llm.instance.parts.rank
        self.pool, self.num_heads = rank.memory.pool.tensor_BLK2ND, rank.shape.query_heads_per_rank
        self.address = f"unix:{llm.instance.config.run_dir}/v.0.sock"
        me = ledger.register(InstanceId("honest"), "unix:nowhere", 4, 0, LEASE_S)
        self.epoch = me.epoch
        creditor = InstanceId("v"), rank.identity.epoch
        assert (
            ledger.borrow(loan_key(LoanId(LOAN)), InstanceId("honest"), me.epoch, *creditor, NUM_LENT, LEASE_S) is None
        )
        self.honest = self.channel("honest")
        lend = pack(LendHeader(LOAN, "honest", me.epoch, NUM_LENT))
        self.block_ids = decode(self.honest.call(MessageKind.LEND, lend, deadline_s=5).header, LendReply).block_ids
        data = torch.randn(NUM_LENT, *self.pool.shape[1:], generator=torch.Generator().manual_seed(0))
        store = pack(StoreHeader(LOAN, self.block_ids))
        assert self.refusal(self.honest.call(MessageKind.STORE, store, [data], deadline_s=5).header) is None
        self.before = self.pool.clone()
        self.expected = self.ask()
        self.accounts = self.books()

    def channel(self, name: str) -> Channel:
        said = hello(instance_id=name, epoch=self.epoch, pool="default", request_bytes=REQUEST_BYTES)
        return connect(self.address, said, peer="v", timeout_s=5)

    @staticmethod
    def refusal(header: bytes) -> object:
        return decode(header, Acknowledge).refusal

    def ask(self) -> bytes:
        """The honest debtor's question, and what it gets."""
        q = torch.ones(1, self.num_heads, self.pool.shape[-1])
        header = pack(QueryHeader(1, 0, [QueryShare([LOAN], self.block_ids, 1)]))
        reply = self.honest.call(MessageKind.QUERY, header, [q], deadline_s=10)
        assert self.refusal(reply.header) is None
        return bytes(reply.payload)

    def books(self) -> object:
        status = self.instance.status(0)
        return status.free_rblocks, status.lent_rblocks, self.instance.parts.lending.lent

    def assert_unharmed(self) -> None:
        self.instance.check_integrity()
        assert torch.equal(self.pool, self.before)
        assert self.books() == self.accounts
        assert self.ask() == self.expected


@pytest.fixture(scope="module")
def victim(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    with ExitStack() as stack:
        server = stack.enter_context(EmbeddedServer())
        ledger = open_ledger(server.url, "default")
        stack.callback(ledger.close)
        config = {
            "instance_id": "v", "model": llama, "run_dir": tmp_path_factory.mktemp("v"),
            "kv_cache": {"num_rblocks": 16, "rblock_size": 8}, "ledger": {"url": server.url, "lease_s": LEASE_S},
        }  # fmt: skip
        made = Victim(stack.enter_context(LLM(InstanceConfig.model_validate(config))), ledger)
        stack.callback(made.honest.close)
        yield made


loan_ids = st.sampled_from([LOAN, "honest.1.1.", "", "x" * 3000])
block_ids = st.lists(numbers, max_size=6)
share = st.fixed_dictionaries(
    {"loan_ids": st.lists(loan_ids, max_size=3), "block_ids": block_ids, "num_queries": numbers}
)
headers = {
    MessageKind.LEND: wild(
        loan_id=loan_ids, debtor=st.sampled_from(["honest", "thief", "v"]), debtor_epoch=numbers, num_rblocks=numbers
    ),
    MessageKind.RELEASE: wild(loan_id=loan_ids, debtor=st.sampled_from(["honest", "thief"])),
    MessageKind.STORE: wild(loan_id=loan_ids, block_ids=block_ids),
    MessageKind.QUERY: wild(step=numbers, layer=numbers, shares=st.none() | st.lists(share | anything, max_size=3)),
    MessageKind.GRANT: wild(loan_id=loan_ids, debtor=st.just("thief"), block_ids=block_ids),
    MessageKind.REVOKE: wild(loan_id=loan_ids),
    MessageKind.STEP: messages,
    MessageKind.STOP: wild(loan_id=loan_ids),
}
said = st.sampled_from(list(headers)).flatmap(lambda kind: st.tuples(st.just(int(kind)), headers[kind] | messages))
payload_sizes = st.sampled_from([0, 1, 64, 256, 4096, 1 << 18])


@settings(max_examples=150, deadline=None)
@given(said=said, payload_bytes=payload_sizes)
@example(said=(int(MessageKind.QUERY), pack(QueryHeader(1, 0))), payload_bytes=64)
@example(said=(int(MessageKind.RELEASE), pack({"loan_id": LOAN, "debtor": "honest"})), payload_bytes=0)
@example(said=(int(MessageKind.QUERY), DEEP), payload_bytes=0)
def test_a_stranger_to_the_loan_reads_and_changes_nothing(
    victim: Victim, said: tuple[int, bytes], payload_bytes: int
) -> None:
    kind, header = said
    with RawPeer(victim.address) as thief:
        thief.shake_hands(hello(instance_id="thief", pool="default", request_bytes=REQUEST_BYTES))
        frame, answer = thief.ring(kind, header, b"\x11" * payload_bytes)
        if frame.kind != ERROR_KIND and kind == MessageKind.QUERY:
            assert frame.payload_bytes == 0 or not touches_memory(header), answer
    victim.assert_unharmed()


def touches_memory(header: bytes) -> bool:
    return any(share.block_ids for share in decode(header, QueryHeader).shares or [])


own_blocks = st.lists(st.integers(-2, 17), max_size=5)
own_share = st.builds(
    lambda blocks, n: {"loan_ids": [LOAN], "block_ids": blocks, "num_queries": n}, own_blocks, numbers
)
hostile_query = st.fixed_dictionaries(
    {"step": numbers, "layer": numbers, "shares": st.lists(own_share, min_size=1, max_size=4)}
).map(pack)


@settings(max_examples=150, deadline=None)
@given(header=hostile_query, num_rows=st.integers(0, 6))
def test_a_debtor_with_wild_numbers_gets_nothing_but_its_own_rblocks(
    victim: Victim, header: bytes, num_rows: int
) -> None:
    # Given the honest debtor's own loan, named correctly, with layers, rBlocks and row counts of all sizes
    row_bytes = victim.num_heads * victim.pool.shape[-1] * 4
    with RawPeer(victim.address) as debtor:
        debtor.shake_hands(hello(instance_id="honest", pool="default", request_bytes=REQUEST_BYTES))
        frame, answer = debtor.ring(MessageKind.QUERY, header, b"\0" * aligned(num_rows * row_bytes))

    # Then an answer only where every rBlock is its own and the layer exists
    if frame.kind != ERROR_KIND and victim.refusal(answer) is None:
        query = decode(header, QueryHeader)
        assert query.layer < victim.pool.shape[1]
        assert sum(share.num_queries for share in query.shares or []) == num_rows
        assert {block for share in query.shares or [] for block in share.block_ids} <= set(victim.block_ids)
    victim.assert_unharmed()


@settings(max_examples=100, deadline=None)
@given(blocks=st.lists(st.integers(-2, 17), max_size=5))
def test_a_debtor_writes_to_its_own_rblocks_only(victim: Victim, blocks: list[int]) -> None:
    data = torch.full((len(blocks), *victim.pool.shape[1:]), 7.0)
    with RawPeer(victim.address) as debtor:
        debtor.shake_hands(hello(instance_id="honest", pool="default", request_bytes=REQUEST_BYTES))
        header = pack({"loan_id": LOAN, "block_ids": blocks})
        frame, answer = debtor.ring(MessageKind.STORE, header, data.numpy().tobytes())
    is_done = frame.kind != ERROR_KIND and victim.refusal(answer) is None
    assert is_done == (set(blocks) <= set(victim.block_ids) and len(set(blocks)) == len(blocks))
    if is_done:
        assert torch.equal(victim.pool[blocks], data)
        victim.pool[blocks] = victim.before[blocks]
    victim.assert_unharmed()


@settings(max_examples=100, deadline=None)
@given(
    frame=st.builds(Frame, *(st.one_of(st.integers(0, 90), st.just((1 << 32) - 1)) for _ in range(3)),
                    st.integers(0, 90) | st.sampled_from([(1 << 20) + 1, (1 << 63), (1 << 64) - 1])),
)  # fmt: skip
def test_a_doorbell_with_wild_numbers_reads_nothing_outside_of_the_mailbox(victim: Victim, frame: Frame) -> None:
    with RawPeer(victim.address) as peer:
        peer.shake_hands(hello(instance_id="thief", pool="default", request_bytes=REQUEST_BYTES))
        answer = unpack(peer.say(frame.pack())[: FRAME_BYTES + 1])
        assert answer.sequence == frame.sequence
        if not frame.fits(REQUEST_BYTES):
            assert answer.kind == ERROR_KIND
    victim.assert_unharmed()


@settings(max_examples=100, deadline=None)
@given(said=st.lists(messages | wild(mac=st.binary(max_size=40), nonce=st.binary(max_size=40)), min_size=1, max_size=3))
def test_garbage_in_a_handshake_opens_nothing(victim: Victim, said: list[bytes]) -> None:
    with RawPeer(victim.address) as peer:
        for data in said:
            peer.say(data or b"\0")
    victim.assert_unharmed()


@settings(max_examples=100, deadline=None)
@given(
    said=wild(
        protocol_version=st.just(2), pool=st.just("default"), instance_id=st.sampled_from(["thief", "a\nb", "x" * 200]),
        epoch=numbers, rank=numbers, request_bytes=numbers, reply_bytes=numbers, nonce=st.binary(max_size=40),
    )
)  # fmt: skip
def test_a_hello_with_wild_numbers_is_refused_or_honest(victim: Victim, said: bytes) -> None:
    with RawPeer(victim.address) as peer:
        answer = msgspec.msgpack.decode(peer.say(said))
        assert answer["type"] == "challenge" or answer["refusal"]
    victim.assert_unharmed()
