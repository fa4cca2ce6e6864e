"""Strangers take all file descriptors of a member or the gateway for a moment; then it answers as before."""

import contextlib
import os
import resource
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest
from megatron_distkv.launch.local_cluster import LocalCluster

from megatron_distkv import framing
from megatron_distkv.engine.addresses import rank_address, request_socket
from megatron_distkv.messages import FromInstance, InstanceStatus, StatusQuery
from megatron_distkv.transport.hello import Challenge
from tests.e2e.conftest import cluster_config, openai_client
from tests.transport.raw_peer import RawPeer, hello

PATIENCE_S = 60.0
# A process gets so many file descriptors beside those that it has; strangers want more, also if others just left.
NUM_SPARE, NUM_STRANGERS = 12, 100
# So many lines in a log are a sentence or two; the strangers' connections times the tries are hundreds.
FEW_LINES = 20


@pytest.fixture(scope="module")
def small_pool(byte_llama: Path) -> Iterator[LocalCluster]:
    with LocalCluster(cluster_config(byte_llama, instances=1, lenders=1)) as running:
        yield running


class Door:
    """Where strangers come in to a process, and how an honest caller is answered there."""

    def __init__(self, cluster: LocalCluster, name: str) -> None:
        process, _, self._way = name.partition("/")
        self.child = cluster.child(process)
        self._cluster = cluster
        if self._way == "channels":
            self._path = rank_address(cluster.run_dir, process, 0).removeprefix("unix:")
        else:
            self._path = str(request_socket(cluster.run_dir, process))

    def stranger(self) -> socket.socket:
        """Connected, or in the queue to be; never waits."""
        if self._way == "http":
            host, port = self._cluster.base_url.removeprefix("http://").split("/")[0].split(":")
            return socket.create_connection((host, int(port)), 10)
        kind = socket.SOCK_SEQPACKET if self._way == "channels" else socket.SOCK_STREAM
        stranger = socket.socket(socket.AF_UNIX, kind)
        stranger.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            stranger.connect(self._path)
        return stranger

    def answers(self) -> bool:
        ways: dict[str, Callable[[], bool]] = {"http": self._completes, "requests": self._tells, "channels": self._asks}
        try:
            return ways[self._way]()
        except OSError:
            return False

    def _completes(self) -> bool:
        with openai_client(self._cluster) as api:
            return api.completions.create(model="distkv", prompt=[5, 6, 7], max_tokens=2).usage is not None

    def _tells(self) -> bool:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(5)
            client.connect(self._path)
            client.sendall(framing.pack(StatusQuery(1)))
            size = int.from_bytes(client.recv(4), "big")
            return isinstance(msgspec.msgpack.decode(client.recv(size), type=FromInstance), InstanceStatus)

    def _asks(self) -> bool:
        """A hello is answered by the question for a proof."""
        with RawPeer(self._path) as peer:
            return bool(msgspec.msgpack.decode(peer.say(msgspec.msgpack.encode(hello(pool="default"))), type=Challenge))


@contextlib.contextmanager
def few_files(pid: int) -> Iterator[int]:
    """How many the process may have meanwhile."""
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    limit = settled(pid) + NUM_SPARE
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit, before[1]))
    try:
        yield limit
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


def settled(pid: int) -> int:
    """How many files it has when nobody comes or goes."""
    counts = [0]
    while len(counts) < 10 or len(set(counts[-10:])) > 1:
        time.sleep(0.1)
        counts.append(num_files(pid))
    return counts[-1]


def num_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def wait_until(condition: Callable[[], bool], what: str) -> None:
    end_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end_s, what
        time.sleep(0.1)


@pytest.mark.parametrize("name", ["instance-0/channels", "instance-0/requests", "lender-0/channels", "gateway/http"])
def test_a_moment_without_file_descriptors_deafens_nobody(small_pool: LocalCluster, name: str) -> None:
    # Given a process that has few file descriptors left, and answers
    door = Door(small_pool, name)
    pid = door.child.process.pid
    wait_until(door.answers, f"{name} does not answer at all")
    lines_before = len(door.child.log.read_text().splitlines())
    with few_files(pid) as limit, ExitStack() as stack:
        # When more strangers come than it can let in, and stay for a while
        for _ in range(NUM_STRANGERS):
            stack.enter_context(door.stranger())
        # Linux gives a number to an accept() that still waits for its connection, here in another thread: not listed.
        wait_until(lambda: num_files(pid) >= limit - 1, f"{name} has file descriptors left")
        time.sleep(2.5)

    # Then, as soon as they have gone, it answers again, and has not filled its log
    wait_until(door.answers, f"{name} is deaf: {door.child.log.read_text()[-2000:]}")
    assert door.child.is_running
    said = door.child.log.read_text().splitlines()[lines_before:]
    assert len(said) < FEW_LINES, said[:FEW_LINES]
