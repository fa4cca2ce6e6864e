"""A creditor that answers anything at all: its debtor notes it as lost, and goes on."""

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from megatron_distkv.attention import Debtor
from megatron_distkv.attention.metadata import RemoteShare
from megatron_distkv.clock import SystemClock
from megatron_distkv.config.instance import LedgerConfig
from megatron_distkv.errors import DistkvError, PeerLost, UnreadableMessage
from megatron_distkv.ledger import CreditorOffer, MemoryLedger
from megatron_distkv.messages import Acknowledge, MessageKind, QueryShare, decode
from megatron_distkv.peers import ControlChannels, MailboxSizes, Migration, Peers
from megatron_distkv.pool import (
    Candidates,
    EndedLoans,
    Identity,
    LinkCost,
    Links,
    LoanBook,
    Loans,
    MemberInfo,
    Membership,
    Peer,
    Quarantine,
    RequestOwner,
)
from megatron_distkv.rblock import InstanceId, LoanId
from megatron_distkv.rmanager import Move
from megatron_distkv.transport import OPEN_POOL, Answer, ChannelRequest, Hello, Listener, connect
from megatron_distkv.transport.frame import FRAME_BYTES, Frame
from megatron_distkv.transport.hello import MAX_HELLO_BYTES, Challenge, Welcome, new_nonce
from megatron_distkv.transport.mailbox import create_memory
from megatron_distkv.transport.pool_secret import Side, proof
from tests.faults.hostile import DEEP, messages, numbers, pack, wild
from tests.pool.at_once import AtOnce
from tests.pool.members import SHAPE, info
from tests.transport.raw_peer import hello

SIZES = MailboxSizes(1 << 16, 1 << 16)
DEADLINE_S = 5.0
QUICK = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
refusals = st.sampled_from([None, "full", "unknown_loan", "no such word", 3])


class HostileCreditor:
    """Its listener is real; `header` and `payload` are what it answers to everything."""

    def __init__(self, directory: Path) -> None:
        self.header, self.payload = b"", torch.empty(0)
        self.address = f"unix:{directory}/h.{{rank}}.sock"
        self.listener = Listener(self.address.format(rank=0), "p", self._answer)
        self.ledger = MemoryLedger()
        self.identity = Identity(InstanceId("d"))
        self.clock = SystemClock()
        config, me = LedgerConfig(lease_s=600.0), MemberInfo(shape=SHAPE)
        self.membership = Membership(self.ledger, self.identity, config, "unix:x", 8, 0, me, self.clock)
        self.membership.join()
        self.ledger.register(InstanceId("h"), self.address, 64, 0, 600.0, info=info())
        self.peers = Peers("p", self.identity, self.clock, 0, SIZES, DEADLINE_S)
        self.control = ControlChannels(self.peers, DEADLINE_S, self.clock)

    def loans(self) -> Loans:
        """Of a debtor that holds nothing against it."""
        cooldown, book = Quarantine(self.clock), LoanBook(self.ledger, self.identity)
        links = Links(self.clock, self._no_link, lambda _: None)
        lost = self.peers.lost
        candidates = Candidates(self.ledger, self.membership, links, cooldown, lost, enabled=True)
        ended = EndedLoans(book, self.clock)
        return Loans(book, candidates, self.control, ended, cooldown, AtOnce(), self.clock, enabled=True)

    @staticmethod
    def _no_link(creditor: CreditorOffer) -> LinkCost:
        raise PeerLost(creditor.instance, "its link is not measured here")

    @property
    def peer(self) -> Peer:
        return Peer("h", 1, self.address)

    def _answer(self, _: Hello, request: ChannelRequest) -> Answer:
        return Answer(self.header, [self.payload])


@pytest.fixture
def creditor(tmp_path: Path) -> Iterator[HostileCreditor]:
    hostile = HostileCreditor(tmp_path)
    yield hostile
    hostile.control.close()
    hostile.peers.close()
    hostile.listener.close()


def is_no_yes(header: bytes) -> bool:
    """Not an honest word that the creditor has ended the loan, and told the ledger."""
    try:
        return decode(header, Acknowledge).refusal is not None
    except UnreadableMessage:
        return True


payloads = st.integers(0, 300).map(lambda size: torch.full((size,), 0xFF, dtype=torch.uint8))


@QUICK
@given(header=messages | wild(refusal=refusals), payload=payloads)
@example(header=DEEP, payload=torch.empty(0))
@example(header=pack({"refusal": None}), payload=torch.zeros(192, dtype=torch.uint8))
def test_a_query_is_answered_in_the_right_shape_or_its_creditor_is_lost(
    creditor: HostileCreditor, header: bytes, payload: torch.Tensor
) -> None:
    creditor.header, creditor.payload = header, payload
    creditor.peers.reach(creditor.peer)
    debtor = Debtor(creditor.peers, DEADLINE_S, creditor.clock)
    debtor.begin_step(1, {"h": RemoteShare(torch.tensor([0, 1]), [QueryShare(["l"], [0], 2)])})
    debtor.ask(0, torch.zeros(2, 2, 4))
    partials = debtor.answers()
    assert len(partials) + len(debtor.lost) == 1
    for partial in partials:
        assert partial.out_RHD.shape == (2, 2, 4)
        assert partial.lse_RH.shape == (2, 2)


@QUICK
@given(
    header=messages | wild(block_ids=st.lists(numbers, max_size=6), refusal=refusals),
    header_at_end=messages.filter(is_no_yes) | st.just(pack({"refusal": "unknown_loan"})),
)
@example(header=pack({"block_ids": [1, 1, 2, 3], "refusal": None}), header_at_end=b"")
@example(header=pack({"block_ids": [], "refusal": None}), header_at_end=b"")
@example(header=pack({"block_ids": [0, 1, 2, 3], "refusal": None}), header_at_end=b"")
@example(header=pack({"block_ids": [0, 1, 2, 3]}), header_at_end=pack({"refusal": "unknown_loan"}))
def test_a_loan_is_as_asked_for_or_there_is_none(
    creditor: HostileCreditor, header: bytes, header_at_end: bytes
) -> None:
    creditor.header = header
    debtor, owner = creditor.loans(), RequestOwner("r")
    debtor.wish(owner, 4)
    loans = debtor.of(owner)
    assert debtor.num_borrowed in (0, 4)
    assert sum(loan.num_rblocks for loan in loans) == debtor.num_borrowed
    assert all(len(set(loan.unused)) == 4 and min(loan.unused) >= 0 for loan in loans)

    # Then giving back what there is leaves no debt in the ledger, whatever the creditor says
    creditor.header = header_at_end
    debtor.end(owner)
    assert creditor.ledger.snapshot().loans == ()


@QUICK
@given(header=messages | wild(refusal=refusals))
def test_a_store_is_acknowledged_or_its_creditor_is_lost(creditor: HostileCreditor, header: bytes) -> None:
    creditor.header = header
    migration = Migration(torch.zeros(4, 1, 1, 2, 4, 4), creditor.peers, 2, DEADLINE_S)
    lost = migration.carry_out([Move("r", creditor.peer, LoanId("l"), [0, 1], [0, 1])])
    assert set(lost) <= {"h"}


class RawCreditor:
    """Speaks the protocol up to a point that a test chooses, then sends what the test wants."""

    def __init__(self, directory: Path) -> None:
        self.address = f"unix:{directory}/raw.sock"
        self.challenge: bytes | None = None  # None: an honest one
        self.welcome: bytes | None = None
        self.doorbell = b""
        self.sends_mailbox = True
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.bind(self.address.removeprefix("unix:"))
        self._socket.listen()
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                with connection, contextlib.suppress(OSError):
                    self._serve(connection)

    def _serve(self, connection: socket.socket) -> None:
        if self.challenge is None and self.welcome is None:
            self._greet(connection)
            connection.recv(FRAME_BYTES)
            connection.send(self.doorbell)
            connection.recv(1)
            return
        connection.recv(4096)
        connection.send(self.challenge or pack(Challenge(new_nonce())))
        connection.recv(4096)
        with open("/dev/null", "rb") as nothing:
            socket.send_fds(connection, [self.welcome or pack(Welcome())], [nothing.fileno()] * self.sends_mailbox)
        connection.recv(1)

    @staticmethod
    def _greet(connection: socket.socket) -> None:
        """As an honest one, but for a mailbox that is full of ones."""
        said, challenge = connection.recv(MAX_HELLO_BYTES), pack(Challenge(new_nonce()))
        connection.send(challenge)
        connection.recv(MAX_HELLO_BYTES)
        size = decode(said, Hello).request_bytes + decode(said, Hello).reply_bytes
        mailbox = create_memory(size)
        try:
            os.pwrite(mailbox, b"\xff" * size, 0)
            mac = proof(OPEN_POOL, Side.LISTENING, said, challenge)
            socket.send_fds(connection, [pack(Welcome(mac=mac))], [mailbox])
        finally:
            os.close(mailbox)


@pytest.fixture
def raw(tmp_path: Path) -> Iterator[RawCreditor]:
    creditor = RawCreditor(tmp_path)
    yield creditor
    creditor.close()


@QUICK
@given(
    challenge=st.none() | messages.filter(bool),
    welcome=messages.filter(bool) | wild(type=st.just("welcome"), mac=st.binary()),
    sends_mailbox=st.booleans(),
)  # fmt: skip
def test_garbage_in_the_listeners_half_of_a_handshake_is_a_lost_peer(
    raw: RawCreditor, challenge: bytes | None, welcome: bytes, sends_mailbox: bool
) -> None:
    num_fds = len(os.listdir("/proc/self/fd"))
    raw.challenge, raw.welcome, raw.sends_mailbox = challenge, welcome, sends_mailbox
    with pytest.raises(PeerLost):
        connect(raw.address, hello(), peer="raw", timeout_s=DEADLINE_S)
    assert len(os.listdir("/proc/self/fd")) <= num_fds + 4  # the other thread's, in the same process


@QUICK
@given(
    doorbell=st.binary(min_size=1, max_size=40)
    | st.builds(
        lambda *numbers: Frame(*numbers).pack(),
        st.integers(0, 2), st.integers(0, 9) | st.just((1 << 32) - 1), st.integers(0, 1 << 17) | st.just((1 << 32) - 1),
        st.integers(0, 1 << 17) | st.just((1 << 64) - 1),
    )
)  # fmt: skip
def test_an_answer_with_wild_numbers_is_a_lost_peer_or_lies_in_the_mailbox(raw: RawCreditor, doorbell: bytes) -> None:
    raw.challenge = raw.welcome = None
    raw.doorbell = doorbell
    channel = connect(raw.address, hello(), peer="raw", timeout_s=DEADLINE_S)
    try:
        reply = channel.call(MessageKind.QUERY, b"", deadline_s=DEADLINE_S)
        assert len(reply.header) + len(reply.payload) <= 1 << 16
    except DistkvError:
        pass
    finally:
        channel.close()


@pytest.mark.parametrize(
    "address", ["", "tcp://x", "unix:", "unix:/a\0b", "unix:/{x}", "unix:/{rank.__class__}", "unix:" + "y" * 300]
)
def test_an_address_in_the_ledger_that_is_none_is_a_lost_peer(creditor: HostileCreditor, address: str) -> None:
    with pytest.raises(PeerLost):
        creditor.peers.reach(Peer("h", 1, address))
