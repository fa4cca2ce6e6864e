"""Membership: who does not know the pool's secret gets no channel, no mailbox and no memory, whatever he says."""

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from megatron_distkv.errors import ConfigError, PeerLost
from megatron_distkv.metrics import INSTANCE_REGISTRY
from megatron_distkv.transport import OPEN_POOL, Answer, ChannelRequest, Hello, Listener, connect, read_secret
from megatron_distkv.transport.hello import Challenge, Proof, Welcome, new_nonce
from megatron_distkv.transport.mailbox import create_memory
from megatron_distkv.transport.pool_secret import Side, proof, write_new_secret
from tests.transport.raw_peer import RawPeer, hello

SECRET = b"correct horse battery staple"


def answer(_: Hello, request: ChannelRequest) -> Answer:
    return Answer(request.header)


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    listener = Listener(f"unix:{tmp_path}/a.sock", "p", answer, secret=SECRET)
    yield f"unix:{tmp_path}/a.sock"
    listener.close()


def num_refused() -> float:
    return INSTANCE_REGISTRY.get_sample_value("distkv_refused_channels_total", {"reason": "secret"}) or 0.0


def test_who_knows_the_secret_gets_a_channel(address: str) -> None:
    channel = connect(address, hello(), peer="a", timeout_s=5, secret=SECRET)
    assert channel.call(1, b"x", deadline_s=5).header == b"x"
    channel.close()


@pytest.mark.parametrize("secret", [OPEN_POOL, b"correct horse battery stable"])
def test_who_does_not_is_refused_with_one_sentence_and_counted(address: str, secret: bytes) -> None:
    before = num_refused()
    with pytest.raises(PeerLost, match="it does not know this pool's secret") as caught:
        connect(address, hello(), peer="a", timeout_s=5, secret=secret)
    assert "\n" not in str(caught.value)
    assert num_refused() == before + 1


@pytest.mark.parametrize("mac", [b"", b"\0" * 32, b"x" * 31, b"x" * 1000])
def test_garbage_instead_of_a_proof_brings_no_mailbox(address: str, mac: bytes) -> None:
    with RawPeer(address) as thief:
        assert thief.shake_hands(hello(), mac=mac).refusal
        assert thief.memory is None


def test_a_proof_that_was_overheard_is_worth_nothing(address: str) -> None:
    # Given everything that an honest peer said, with its own nonce
    mine = hello()
    said = msgspec.msgpack.encode(mine)
    with RawPeer(address) as honest:
        overheard = proof(SECRET, Side.CONNECTING, said, honest.say(said))
        honest.socket.send(msgspec.msgpack.encode(Proof(overheard)))
        assert not msgspec.msgpack.decode(honest.socket.recv(4096), type=Welcome).refusal

    # When somebody says the same again, then the listener's nonce is another one
    with RawPeer(address) as thief:
        assert "secret" in thief.shake_hands(mine, mac=overheard).refusal


def test_the_listeners_own_proof_does_not_open_another_channel(address: str) -> None:
    # Given a listener's proof over words that a thief chose
    with RawPeer(address) as thief:
        said = msgspec.msgpack.encode(hello())
        challenge = thief.say(said)
        reflected = proof(SECRET, Side.LISTENING, said, challenge)
        thief.socket.send(msgspec.msgpack.encode(Proof(reflected)))

        # Then it does not serve as the connecting side's
        assert "secret" in msgspec.msgpack.decode(thief.socket.recv(4096), type=Welcome).refusal


def test_another_hello_than_the_one_proven_is_refused(address: str) -> None:
    """Somebody in the middle who changes the name keeps the proof of the old one."""
    with RawPeer(address) as middle:
        challenge = middle.say(msgspec.msgpack.encode(hello(instance_id="victim")))
        mac = proof(SECRET, Side.CONNECTING, msgspec.msgpack.encode(hello(instance_id="me")), challenge)
        middle.socket.send(msgspec.msgpack.encode(Proof(mac)))
        assert "secret" in msgspec.msgpack.decode(middle.socket.recv(4096), type=Welcome).refusal


class FalseListener:
    """Takes every proof, and answers with what a test gives it."""

    def __init__(self, path: Path, welcome: Welcome, size_bytes: int, *, sealed: bool = True) -> None:
        self.address = f"unix:{path}"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.bind(str(path))
        self._socket.listen()
        self._answer = (welcome, size_bytes, sealed)
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        welcome, size_bytes, sealed = self._answer
        connection, _ = self._socket.accept()
        with connection:
            said = connection.recv(4096)
            challenge = msgspec.msgpack.encode(Challenge(new_nonce()))
            connection.send(challenge)
            connection.recv(4096)
            if welcome.mac == b"honest":
                welcome = Welcome(mac=proof(SECRET, Side.LISTENING, said, challenge))
            fd = create_memory(size_bytes) if sealed else os.memfd_create("unsealed")
            os.ftruncate(fd, size_bytes)
            socket.send_fds(connection, [msgspec.msgpack.encode(welcome)], [fd])
            os.close(fd)

    def close(self) -> None:
        self._thread.join()
        self._socket.close()


@pytest.mark.parametrize(
    ("welcome", "size_bytes", "sealed", "reason"),
    [
        (Welcome(), 1 << 17, True, "the listener does not know this pool's secret"),
        (Welcome(mac=b"x" * 32), 1 << 17, True, "the listener does not know this pool's secret"),
        (Welcome(mac=b"honest"), 1 << 12, True, "another size"),
        (Welcome(mac=b"honest"), 1 << 17, False, "could shrink"),
    ],
)
def test_a_false_listener_is_left(tmp_path: Path, welcome: Welcome, size_bytes: int, sealed: bool, reason: str) -> None:
    listener = FalseListener(tmp_path / "f.sock", welcome, size_bytes, sealed=sealed)
    with pytest.raises(PeerLost, match=reason):
        connect(listener.address, hello(), peer="f", timeout_s=5, secret=SECRET)
    listener.close()


def test_the_socket_is_for_its_owner_only(address: str) -> None:
    assert os.stat(address.removeprefix("unix:")).st_mode & 0o077 == 0


def test_a_new_secret_is_random_and_private(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_new_secret(tmp_path / name)
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o600
    assert read_secret(tmp_path / "one") != read_secret(tmp_path / "two")
    with pytest.raises(FileExistsError):
        write_new_secret(tmp_path / "one")


def test_a_secret_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISTKV_SECRET", raising=False)
    assert read_secret(None) == OPEN_POOL
    monkeypatch.setenv("DISTKV_SECRET", SECRET.decode())
    assert read_secret(None) == SECRET


@pytest.mark.parametrize(
    ("content", "mode", "sentence"),
    [
        (None, 0o600, "cannot read the pool's secret"),
        ("long enough to be a secret", 0o644, "others may read the pool's secret"),
        ("short", 0o600, "has 5 bytes"),
        (" \n", 0o600, "is empty"),
    ],
)
def test_a_secret_that_cannot_be_used_is_one_sentence(
    tmp_path: Path, content: str | None, mode: int, sentence: str
) -> None:
    file = tmp_path / "secret"
    if content is not None:
        file.write_text(content)
        file.chmod(mode)
    with pytest.raises(ConfigError, match=sentence) as caught:
        read_secret(file)
    assert "\n" not in str(caught.value)
