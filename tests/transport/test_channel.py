"""Channels between real processes: tensors arrive whole, and every way for a peer to fail ends in PeerLost."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_distkv.errors import PeerLost, UserError
from megatron_distkv.transport import (
    Answer,
    ChannelRequest,
    Hello,
    Listener,
    TensorSpec,
    connect,
    read_tensors,
)
from megatron_distkv.transport.channel import RequestFailed
from megatron_distkv.transport.mailbox import MessageTooLong
from megatron_distkv.transport.tensors import PayloadMismatch
from tests.transport.raw_peer import RawPeer, hello
from tests.transport.ways import WAYS, Way, make_way

ECHO, DOUBLE, FAIL = 1, 2, 3


def answer(_: Hello, request: ChannelRequest) -> Answer:
    if request.kind == FAIL:
        raise ValueError("no such thing")
    data = torch.frombuffer(request.payload, dtype=torch.uint8).clone() if len(request.payload) else torch.empty(0)
    return Answer(request.header, [data.view(torch.float32) * 2] if request.kind == DOUBLE else [data])


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, tmp_path: Path) -> Way:
    """What every contract here holds for: shared memory, TCP, TLS."""
    return make_way(request.param, tmp_path)


@pytest.fixture
def listening(way: Way) -> Iterator[Way]:
    listener = Listener(way.listen, "p", answer, tls=way.tls)
    yield way
    listener.close()


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    listener = Listener(f"unix:{tmp_path}/a.sock", "p", answer)
    yield f"unix:{tmp_path}/a.sock"
    listener.close()
    assert not (tmp_path / "a.sock").exists()


OTHER_PROCESS = """
import sys, time, torch
from megatron_distkv.transport import *
def answer(hello, request):
    if request.kind == 3: time.sleep(60)
    (x,) = read_tensors(request.payload, [TensorSpec((4, 8), torch.float32)])
    return Answer(request.header, [x * 2])
listener = Listener(sys.argv[1], "p", answer)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.fixture(params=["unix", "tcp", "nixl"])
def other(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    address = make_way(request.param, tmp_path).listen
    process = subprocess.Popen([sys.executable, "-c", OTHER_PROCESS, address], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    yield address, process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_tensor_goes_to_another_process_and_comes_back(other: tuple[str, subprocess.Popen[str]]) -> None:
    channel = connect(other[0], hello(), peer="b", timeout_s=5)
    for step in range(50):
        x = torch.full((4, 8), float(step))
        reply = channel.call(DOUBLE, b"h%d" % step, [x], deadline_s=5)
        (doubled,) = read_tensors(reply.payload, [TensorSpec((4, 8), torch.float32)])
        assert reply.header == b"h%d" % step
        assert torch.equal(doubled, x * 2)
    channel.close()


def test_a_killed_peer_is_lost_while_we_wait(other: tuple[str, subprocess.Popen[str]]) -> None:
    # Given a peer that is busy with our question
    channel = connect(other[0], hello(), peer="b", timeout_s=5)
    channel.post(FAIL, b"", [torch.zeros(4, 8)])

    # When it is killed with -9
    threading.Timer(0.2, other[1].kill).start()

    # Then we hear of it long before the deadline, and the channel stays closed
    with pytest.raises(PeerLost, match="lost b"):
        channel.wait(deadline_s=50)
    with pytest.raises(PeerLost, match="closed"):
        channel.post(DOUBLE, b"")


def test_a_stopped_peer_is_lost_at_the_deadline(other: tuple[str, subprocess.Popen[str]]) -> None:
    channel = connect(other[0], hello(), peer="b", timeout_s=5)
    os.kill(other[1].pid, signal.SIGSTOP)
    os.waitpid(other[1].pid, os.WUNTRACED)  # it has really stopped
    channel.post(DOUBLE, b"", [torch.zeros(4, 8)])
    with pytest.raises(PeerLost, match="deadline"):
        channel.wait(deadline_s=0.2)
    assert not channel.is_open


def test_nobody_at_the_address(way: Way) -> None:
    with pytest.raises(PeerLost, match="no channel"):
        way.connect(hello())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"pool": "other"}, "this is pool 'p', not 'other'"),
        ({"protocol_version": 99}, "protocol version 99 meets"),
        ({"request_bytes": 1 << 40}, "at most"),
        ({"reply_bytes": 0}, "at least one byte"),
    ],
)
def test_a_wrong_hello_is_refused_with_a_reason(listening: Way, changes: dict[str, object], reason: str) -> None:
    with pytest.raises(PeerLost, match=reason):
        listening.connect(hello(**changes))


def test_an_error_of_the_peer_is_a_sentence_and_the_channel_lives_on(listening: Way) -> None:
    channel = listening.connect(hello())
    with pytest.raises(RequestFailed, match="ValueError: no such thing"):
        channel.call(FAIL, b"", deadline_s=5)
    assert channel.call(ECHO, b"still here", deadline_s=5).header == b"still here"
    channel.close()


def test_a_message_that_does_not_fit_is_refused_before_it_is_sent(listening: Way) -> None:
    channel = listening.connect(hello())
    with pytest.raises(MessageTooLong):
        channel.post(ECHO, b"", [torch.zeros(1 << 16)])
    assert channel.call(ECHO, b"next", deadline_s=5).header == b"next"
    channel.close()


def test_a_payload_of_another_size_is_refused() -> None:
    with pytest.raises(PayloadMismatch):
        read_tensors(memoryview(b"\0" * 64), [TensorSpec((17,), torch.float32)])


def test_a_disconnect_is_told(way: Way) -> None:
    gone = threading.Event()
    listener = Listener(way.listen, "p", answer, tls=way.tls, on_disconnect=lambda _: gone.set())
    channel = way.connect(hello())
    assert channel.call(ECHO, b"here", deadline_s=5).header == b"here"  # so that the other side has met it, too
    channel.close()
    assert gone.wait(5)
    listener.close()


def test_a_listener_that_closes_is_lost_to_its_peers(way: Way) -> None:
    listener = Listener(way.listen, "p", answer, tls=way.tls)
    channel = way.connect(hello())
    listener.close()
    with pytest.raises(PeerLost):
        channel.call(ECHO, b"x", deadline_s=5)


def test_large_and_odd_payloads_arrive_byte_by_byte(listening: Way) -> None:
    # Given tensors of several dtypes and odd sizes, one empty, one not contiguous, larger together than socket buffers
    channel = listening.connect(hello(request_bytes=24 << 20, reply_bytes=24 << 20))
    payload = [
        torch.randn(5 << 20),
        torch.arange(7, dtype=torch.uint8),
        torch.empty(0),
        torch.randn(33, 65).to(torch.bfloat16).T,
    ]
    specs = [TensorSpec(tuple(x.shape), x.dtype) for x in payload]

    # When they go there and back, then they are the same
    for _ in range(2):
        reply = channel.call(ECHO, b"h" * 1000, payload, deadline_s=30)
        assert reply.header == b"h" * 1000
        assert all(torch.equal(x, y) for x, y in zip(payload, read_tensors(reply.payload, specs), strict=True))
    channel.close()


def test_a_socket_path_that_is_too_long_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="choose a shorter run_dir"):
        Listener(f"unix:{tmp_path}/{'x' * 120}", "p", answer)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(garbage=st.binary(min_size=1, max_size=80), frame=st.binary(min_size=1, max_size=40))
def test_garbage_neither_kills_nor_blocks_the_listener(address: str, garbage: bytes, frame: bytes) -> None:
    # Given garbage as a hello, and garbage as a doorbell after a good hello
    with RawPeer(address) as raw:
        raw.say(garbage)
    with RawPeer(address) as raw:
        raw.shake_hands(hello())
        raw.say(frame)

    # Then an honest peer is still answered
    channel = connect(address, hello(), peer="a", timeout_s=5)
    assert channel.call(ECHO, b"x", deadline_s=5).header == b"x"
    channel.close()
