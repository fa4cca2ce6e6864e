"""The door for gateways: whom it lets in, and how it closes."""

import contextlib
import logging
import os
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from megatron_distkv import framing
from megatron_distkv.engine.request_io import RequestIO
from megatron_distkv.errors import UserError
from megatron_distkv.messages import FromInstance, StatusQuery, TokenOutput


@pytest.fixture
def generous_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def client(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(10)
    connection.connect(str(path))
    return connection


def all_that_comes(connection: socket.socket) -> bytes:
    received = b""
    with contextlib.suppress(ConnectionResetError):  # a listener closed before it took the connection
        while data := connection.recv(1 << 16):
            received += data
    return received


def test_only_its_own_user_may_ask(tmp_path: Path, generous_umask: None) -> None:
    path = tmp_path / "requests.sock"
    io = RequestIO(path)
    try:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        client(path).close()
    finally:
        io.close()
    assert not path.exists()


def test_it_closes_in_silence_and_lets_clients_have_the_last_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Given one client that waits for an answer, one in the middle of a message, one that does not read, one just there
    path = tmp_path / "requests.sock"
    io = RequestIO(path)
    waiting, talking, deaf = client(path), client(path), client(path)
    for connection in (waiting, deaf):
        connection.sendall(framing.pack(StatusQuery(1)))
    first, second = io.inbox.get(timeout=10).client, io.inbox.get(timeout=10).client
    talking.sendall(b"\0\0")
    last = TokenOutput("r", list(range(100_000)), finish_reason="length")
    for number in (first, second):
        io.send(number, [last])
    fresh = client(path)

    # When it closes
    with caplog.at_level(logging.DEBUG):
        received: list[bytes] = []
        reader = threading.Thread(target=lambda: received.append(all_that_comes(waiting)))
        reader.start()
        io.close()
        reader.join(10)

    # Then who reads has the whole message, all see the end, and nothing is said about it
    assert msgspec.msgpack.decode(received[0][4:], type=FromInstance) == last
    assert all_that_comes(talking) == b""
    assert all_that_comes(fresh) == b""
    assert [record.getMessage() for record in caplog.records] == []
    for connection in (waiting, talking, deaf, fresh):
        connection.close()


def test_a_path_that_cannot_be_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot listen at"):
        RequestIO(tmp_path / "no such directory" / "requests.sock")
