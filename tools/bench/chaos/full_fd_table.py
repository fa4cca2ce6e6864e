"""A part whose table of open files is full for a moment: a low limit, and connections that take the rest.

Connections that came meanwhile may be lost. Afterwards the part takes connections as before.
"""

import json
import random
import resource
import socket
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from megatron_distkv.engine.addresses import rank_address
from tools.bench.chaos.scene import Course, Scene

KIND = "full-fd-table"
# Files that a part may still open, and strangers' connections that take them.
NUM_LEFT, NUM_STRANGERS = 4, 12
LASTS_S = 4.0
# A listener that paused goes on by then.
ANSWERS_WITHIN_S = 20.0
Connect = Callable[[], socket.socket]


def fill_fd_table(scene: Scene, rng: random.Random) -> Course:
    pool, lasts_s = scene.pool, rng.uniform(0.5, LASTS_S)
    part = scene.pick(rng, [*pool.instance_ids, *pool.lender_ids, *scene.gateways.base_urls])
    if part is None:
        return
    connect = _door_of(scene, part)
    with scene.breaking(KIND, part), ExitStack() as strangers:
        pid = pool.child(part).process.pid
        usual = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        num_open = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (num_open + NUM_LEFT, usual[1]))
        for _ in range(NUM_STRANGERS):
            with suppress(OSError):
                strangers.enter_context(connect())
        yield from scene.wait(lasts_s)
        with suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_NOFILE, usual)
        strangers.close()
        yield from _look_after(scene, part, connect)


def _look_after(scene: Scene, part: str, connect: Connect) -> Course:
    """One that ended by itself, or is deaf now, is told of and started again."""
    probe = _Probe(connect)
    yield from scene.until(probe.is_answered, ANSWERS_WITHIN_S)
    probe.close()
    if not scene.pool.child(part).is_running:
        scene.fail(KIND, f"{part} ended: {scene.last_words(part)}")
    elif not probe.has_answer:
        scene.fail(KIND, f"{part} still answered no connection {ANSWERS_WITHIN_S:.0f} s after its file table was full")
        scene.pool.kill(part)  # so that the rest of the run tells of the rest
    yield from scene.bring_back(KIND, part)


class _Probe:
    """Says something senseless, and looks whether somebody cares: an answer, or the end of the connection.

    A new one every second: those that came before may have been lost.
    """

    def __init__(self, connect: Connect) -> None:
        self._connect = connect
        self._doors: list[socket.socket] = []
        self._ticks = 0
        self.has_answer = False

    def is_answered(self) -> bool:
        if self._ticks % 20 == 0:
            with suppress(OSError):
                self._doors.append(self._connect())
                self._doors[-1].sendall(b"GET /nothing HTTP/1.0\r\n\r\n")
        self._ticks += 1
        self.has_answer = self.has_answer or any(_cares(door) for door in self._doors)
        return self.has_answer

    def close(self) -> None:
        for door in self._doors:
            door.close()


def _cares(door: socket.socket) -> bool:
    try:
        door.recv(1)
        return True
    except BlockingIOError:
        return False
    except OSError:
        return True


def _door_of(scene: Scene, part: str) -> Connect:
    """A connection that does not block: to a gateway's port, or to where a member takes channels."""
    url = scene.gateways.base_urls.get(part)
    if url is not None:
        at = urlsplit(url)
        return lambda: _connected(socket.AF_INET, socket.SOCK_STREAM, (at.hostname, at.port))
    run_dir = json.loads(Path(scene.pool.child(part).command[-1]).read_text())["run_dir"]
    address = rank_address(Path(run_dir), part, 0).partition(":")[2]
    return lambda: _connected(socket.AF_UNIX, socket.SOCK_SEQPACKET, address)


def _connected(family: int, kind: int, address: Any) -> socket.socket:
    door = socket.socket(family, kind)
    door.settimeout(1.0)
    try:
        door.connect(address)
    except OSError:
        door.close()
        raise
    door.setblocking(False)
    return door
