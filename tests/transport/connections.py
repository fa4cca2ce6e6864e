"""Connections that a listener of this process has taken, as the kernel shows them: they may break from outside."""

import contextlib
import os
import random
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_distkv.address import parse_address


def break_connections(address: str) -> None:
    """All that the listener at `address`, `unix:PATH`, has at this moment: both sides see the end of the stream."""
    for fd in _taken_at(address):
        _break(fd)


def break_a_connection(address: str, rng: random.Random) -> bool:
    """Any one of them; False: there is none."""
    found = list(_taken_at(address))
    if found:
        _break(rng.choice(found))
    return bool(found)


def _taken_at(address: str) -> Iterator[int]:
    path = parse_address(address).unix_path
    for fd in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError), _as_socket(fd) as found:  # it is none, or was closed a moment ago
            is_listening = found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            if found.family is socket.AF_UNIX and found.getsockname() == path and not is_listening:
                yield fd


def _break(fd: int) -> None:
    with contextlib.suppress(OSError), _as_socket(fd) as connection:  # of one that was cut a moment ago
        connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def _as_socket(fd: int) -> Iterator[socket.socket]:
    """Another descriptor of the same connection."""
    copy = os.dup(fd)
    try:
        found = socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        raise
    with found:
        yield found
