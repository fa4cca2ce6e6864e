"""Strangers and bad manners at a TCP listener: nobody holds it up, nobody without a certificate is heard."""

import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_distkv.config.network import NetworkConfig
from megatron_distkv.errors import ConfigError, PeerLost
from megatron_distkv.transport import (
    OPEN_POOL,
    Answer,
    ChannelRequest,
    Hello,
    Listener,
    connect,
    listener,
    load_tls,
    stream_link,
)
from megatron_distkv.transport.frame import Frame
from megatron_distkv.transport.handshake import Greeting, introduce
from megatron_distkv.transport.stream_link import StreamWire
from tests.transport.raw_peer import SILENCE_S, hello
from tests.transport.ways import free_port, make_certificates, member_tls


def answer(_: Hello, request: ChannelRequest) -> Answer:
    return Answer(request.header, [torch.zeros(4)])


@pytest.fixture
def port() -> Iterator[int]:
    port = free_port()
    listening = Listener(f"tcp://127.0.0.1:{port}", "p", answer)
    yield port
    listening.close()


def reach(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), SILENCE_S)


def assert_still_serving(port: int) -> None:
    channel = connect(f"tcp://127.0.0.1:{port}", hello(), peer="a", timeout_s=SILENCE_S)
    assert channel.call(1, b"x", deadline_s=SILENCE_S).header == b"x"
    channel.close()


def closes(connection: socket.socket) -> bool:
    try:
        while connection.recv(4096):
            pass
    except ConnectionError:
        return True
    return True


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(garbage=st.binary(min_size=1, max_size=80), doorbell=st.binary(min_size=20, max_size=40))
def test_garbage_neither_kills_nor_blocks_the_listener(port: int, garbage: bytes, doorbell: bytes) -> None:
    # Given garbage as a word, as a word of the right length, and as a doorbell after a good hello
    with reach(port) as stranger:
        stranger.sendall(garbage)
    with reach(port) as stranger:
        stranger.sendall(struct.pack("<I", len(garbage)) + garbage)
    with reach(port) as member:
        introduce(StreamWire(member, SILENCE_S), hello(), b"")
        member.sendall(doorbell)
    # Then an honest peer is still answered
    assert_still_serving(port)


@pytest.mark.parametrize("frame", [Frame(1, 1, 1 << 31, 0), Frame(1, 1, 0, 1 << 62), Frame(1, 1, 70_000, 0)])
def test_a_message_larger_than_was_agreed_on_ends_the_channel(port: int, frame: Frame) -> None:
    with reach(port) as member:
        introduce(StreamWire(member, SILENCE_S), hello(), b"")
        member.sendall(frame.pack())
        assert closes(member)
    assert_still_serving(port)


def test_a_word_of_gigabytes_is_not_waited_for(port: int) -> None:
    with reach(port) as stranger:
        stranger.sendall(struct.pack("<I", 1 << 31) + b"x")
        assert closes(stranger)


def test_who_trickles_is_shown_out(monkeypatch: pytest.MonkeyPatch) -> None:
    # Given little patience for words and for messages that have begun
    monkeypatch.setattr(listener, "HELLO_TIMEOUT_S", 0.3)
    monkeypatch.setattr(stream_link, "STALLED_S", 0.3)
    port = free_port()
    listening = Listener(f"tcp://127.0.0.1:{port}", "p", answer)

    # When a stranger sends its word byte by byte, and a member only half of a message
    with reach(port) as stranger, reach(port) as member:
        introduce(StreamWire(member, SILENCE_S), hello(), b"")
        member.sendall(Frame(1, 1, 1000, 0).pack() + b"half")
        began_s, shown_out = time.monotonic(), False
        while not shown_out and time.monotonic() < began_s + SILENCE_S:
            try:
                stranger.sendall(b"\1")
                time.sleep(0.05)
            except ConnectionError:
                shown_out = True
        # Then both are closed, though the one never paused
        assert shown_out
        assert closes(member)
    listening.close()


def test_strangers_cannot_take_all_threads(port: int) -> None:
    # Given as many silent strangers as a listener hears at one time
    with ExitStack() as stack:
        for _ in range(listener.MAX_STRANGERS):
            stack.enter_context(reach(port))
        time.sleep(0.2)
        # When one more comes, then it is turned away at once
        with reach(port) as one_more:
            assert closes(one_more)
    # And when they have gone, members come in again
    end_s = time.monotonic() + SILENCE_S
    while True:
        try:
            return assert_still_serving(port)
        except PeerLost:
            assert time.monotonic() < end_s


def test_a_peer_that_takes_nothing_in_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    # Given a listener that never reads what follows the handshake
    monkeypatch.setattr(stream_link, "STALLED_S", 0.5)
    gate, port = threading.Event(), free_port()
    with socket.create_server(("127.0.0.1", port)) as listening:

        def greet_and_stall() -> None:
            connection, _ = listening.accept()
            with connection:
                greeting = Greeting(StreamWire(connection, SILENCE_S), OPEN_POOL)
                greeting.welcome(greeting.receive("p", 1 << 30))
                gate.wait(SILENCE_S)

        thread = threading.Thread(target=greet_and_stall)
        thread.start()
        big = hello(request_bytes=64 << 20)
        channel = connect(f"tcp://127.0.0.1:{port}", big, peer="a", timeout_s=SILENCE_S)
        # When more is sent than the network holds, then the sender gives up
        with pytest.raises(PeerLost, match="timed out"):
            channel.post(1, b"", [torch.zeros(12 << 20)])
        gate.set()
        thread.join()


# ------------------------------------------------------------------------------------------ TLS


@pytest.fixture
def tls_port() -> Iterator[int]:
    port = free_port()
    listening = Listener(f"tcp://127.0.0.1:{port}", "p", answer, tls=member_tls())
    yield port
    listening.close()


def test_who_speaks_no_tls_is_not_heard(tls_port: int) -> None:
    with pytest.raises(PeerLost):
        connect(f"tcp://localhost:{tls_port}", hello(), peer="a", timeout_s=SILENCE_S)


def test_a_certificate_of_another_authority_is_refused_by_both_sides(tls_port: int) -> None:
    files = make_certificates("strangers")
    strangers = load_tls(files.certificate, files.key, files.authority)
    # The stranger does not trust the member
    with pytest.raises(PeerLost, match="CERTIFICATE_VERIFY_FAILED"):
        connect(f"tls://localhost:{tls_port}", hello(), peer="a", timeout_s=SILENCE_S, tls=strangers)
    # And if it did, the member does not trust the stranger
    strangers.connecting.load_verify_locations(make_certificates().authority)
    with pytest.raises(PeerLost):
        connect(f"tls://localhost:{tls_port}", hello(), peer="a", timeout_s=SILENCE_S, tls=strangers)


def speak(connection: socket.socket) -> None:
    """TLS 1.3 tells a client that it is refused only when it sends or receives."""
    connection.sendall(struct.pack("<I", 1) + b"x")
    connection.recv(1)


def test_a_client_without_a_certificate_is_refused(tls_port: int) -> None:
    context = ssl.create_default_context(cafile=make_certificates().authority)
    with reach(tls_port) as plain:
        inside = context.wrap_socket(plain, server_hostname="localhost")
        with inside, pytest.raises(OSError):
            speak(inside)


def test_a_certificate_of_another_host_is_refused(tls_port: int) -> None:
    with pytest.raises(PeerLost, match="CERTIFICATE_VERIFY_FAILED"):
        connect(f"tls://127.0.0.1:{tls_port}", hello(), peer="a", timeout_s=SILENCE_S, tls=member_tls())


def test_what_is_said_inside_of_tls_cannot_be_read_outside(tls_port: int) -> None:
    # Given somebody in the middle who keeps what passes
    passed, port = bytearray(), free_port()
    with socket.create_server(("127.0.0.1", port)) as middle:

        def carry() -> None:
            near, _ = middle.accept()
            with near, reach(tls_port) as far:
                far.settimeout(0.05)
                near.settimeout(0.05)
                while True:
                    for end, other in ((near, far), (far, near)):
                        try:
                            data = end.recv(65536)
                        except TimeoutError:
                            continue
                        if not data:
                            return
                        passed.extend(data)
                        other.sendall(data)

        thread = threading.Thread(target=carry)
        thread.start()
        tls = member_tls()
        channel = connect(f"tls://localhost:{port}", hello(), peer="a", timeout_s=SILENCE_S, tls=tls)
        assert channel.call(1, b"a secret of ours", deadline_s=SILENCE_S).header == b"a secret of ours"
        channel.close()
        thread.join()
    assert len(passed) > 100
    assert b"a secret of ours" not in passed


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"listen": "tcp://x"}, "is not tcp://HOST:PORT"),
        ({"listen": "tls://h:1"}, "the certificate makes it TLS"),
        ({"listen": "tcp://0.0.0.0:7000"}, "set advertised_host"),
        ({"shared_memory": False}, "nobody can reach it"),
        ({"certificate_file": "c.pem"}, "needs all of certificate_file, key_file and authority_file"),
    ],
)
def test_a_network_that_cannot_be_is_one_sentence(values: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        NetworkConfig.model_validate(values)


def test_files_that_are_no_certificates_are_one_sentence() -> None:
    files = make_certificates()
    with pytest.raises(ConfigError, match="is not there"):
        load_tls(files.certificate, files.key.with_name("nothing"), files.authority)
    with pytest.raises(ConfigError, match="cannot be used"):
        load_tls(files.key, files.key, files.authority)
    with pytest.raises(ConfigError, match=r"authority .* cannot be used"):
        load_tls(files.certificate, files.key, files.key)
