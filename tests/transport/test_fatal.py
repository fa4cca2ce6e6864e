"""What a listener lives with, and what its process must end for."""

import errno
import logging
import resource
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from megatron_distkv.errors import IntegrityError, PeerLost, RankLost
from megatron_distkv.transport import Answer, ChannelRequest, Hello, Listener
from tests.transport.raw_peer import RawPeer, hello
from tests.transport.ways import Way, make_way

ECHO, BREAK, LOSE_A_RANK = 1, 2, 3
PATIENCE_S = 30.0


def answer(_: Hello, request: ChannelRequest) -> Answer:
    if request.kind == BREAK:
        raise IntegrityError("rBlock 7 is free and lent")
    if request.kind == LOSE_A_RANK:
        raise RankLost("a rank 1", "no answer within the deadline")
    return Answer(request.header)


class Deaths:
    """What was reported as fatal."""

    def __init__(self) -> None:
        self.errors: list[BaseException] = []
        self._came = threading.Event()

    def note(self, error: BaseException) -> None:
        self.errors.append(error)
        self._came.set()

    def wait(self) -> BaseException:
        assert self._came.wait(PATIENCE_S)
        return self.errors[0]


@pytest.fixture
def deaths() -> Deaths:
    return Deaths()


@pytest.fixture(params=["unix", "tcp"])
def way(request: pytest.FixtureRequest, tmp_path: Path) -> Way:
    return make_way(request.param, tmp_path)


@pytest.fixture
def listening(way: Way, deaths: Deaths) -> Iterator[Way]:
    listener = Listener(way.listen, "p", answer, on_fatal=deaths.note)
    yield way
    listener.close()


def echoes(way: Way) -> bool:
    channel = way.connect(hello())
    reply = channel.call(ECHO, b"still here", deadline_s=PATIENCE_S)
    channel.close()
    return reply.header == b"still here"


def accept_fails(monkeypatch: pytest.MonkeyPatch, *numbers: int) -> threading.Event:
    """The next calls of accept() fail with these; returns what is set when they have."""
    original: Callable[..., object] = socket.socket.accept
    left, done = list(numbers), threading.Event()

    def accept(self: socket.socket) -> object:
        if left:
            number = left.pop(0)
            done.set() if not left else None
            raise OSError(number, "injected")
        return original(self)

    monkeypatch.setattr(socket.socket, "accept", accept)
    return done


@pytest.mark.parametrize(("kind", "error"), [(BREAK, IntegrityError), (LOSE_A_RANK, RankLost)])
def test_what_a_process_cannot_go_on_with_is_no_answer(
    listening: Way, deaths: Deaths, kind: int, error: type[Exception]
) -> None:
    # When a message breaks the accounts, or a rank of this instance is gone
    channel = listening.connect(hello())
    with pytest.raises(PeerLost):
        channel.call(kind, b"", deadline_s=PATIENCE_S)
    # Then its peer gets no word that it could take for an answer, and the process hears of it
    assert isinstance(deaths.wait(), error)


def test_what_a_single_connection_or_the_system_lacks_is_waited_for(
    way: Way, deaths: Deaths, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # Given a listener whose next connections fail for a moment
    failed = accept_fails(monkeypatch, errno.EMFILE, errno.ECONNABORTED, errno.ENFILE, errno.ENOBUFS, errno.EPROTO)
    listener = Listener(way.listen, "p", answer, on_fatal=deaths.note)
    # Then it says so once, and answers
    assert failed.wait(PATIENCE_S)
    assert echoes(way)
    assert len([x for x in caplog.records if "no channel can be taken" in x.getMessage()]) == 1
    assert deaths.errors == []
    listener.close()


def test_a_listener_that_nobody_can_reach_any_more_is_fatal(
    way: Way, deaths: Deaths, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    accept_fails(monkeypatch, errno.EBADF)
    listener = Listener(way.listen, "p", answer, on_fatal=deaths.note)
    error = deaths.wait()
    assert isinstance(error, OSError)
    assert error.errno == errno.EBADF
    assert any("nobody can come in" in record.getMessage() for record in caplog.records)
    listener.close()


def test_a_listener_that_is_closed_is_not_fatal(way: Way, deaths: Deaths) -> None:
    listener = Listener(way.listen, "p", answer, on_fatal=deaths.note)
    assert echoes(way)
    listener.close()
    with pytest.raises(PeerLost):
        echoes(way)
    assert deaths.errors == []


def test_who_looks_in_and_leaves_is_no_news(tmp_path: Path, deaths: Deaths, caplog: pytest.LogCaptureFixture) -> None:
    # Given a listener, as a load balancer's probe and a member that measures the way see it
    gone = threading.Event()
    way = make_way("unix", tmp_path)
    listener = Listener(way.listen, "p", answer, on_disconnect=lambda _: gone.set(), on_fatal=deaths.note)
    with caplog.at_level(logging.INFO):
        # When one connects and leaves at once, and one leaves after its answer
        with RawPeer(way.listen):
            pass
        assert echoes(way)
        assert gone.wait(PATIENCE_S)
        listener.close()
    # Then nothing is said
    assert [record.getMessage() for record in caplog.records] == []


def test_a_channel_beyond_file_descriptor_1023(listening: Way) -> None:
    # Given a process with so many files that select() cannot name another one
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit < 1400:
        if most != resource.RLIM_INFINITY and most < 1400:
            pytest.skip("1,400 file descriptors are not allowed here")
        resource.setrlimit(resource.RLIMIT_NOFILE, (1400, most))
    with ExitStack() as stack:
        for _ in range(1100):
            stack.enter_context(open("/dev/null"))
        # Then a channel can still be asked whether its answer has come
        channel = listening.connect(hello())
        stack.callback(channel.close)
        channel.post(ECHO, b"far out")
        assert channel.is_answered(PATIENCE_S)
        assert channel.wait(PATIENCE_S).header == b"far out"
