"""The connecting side: ask one question at a time, and never wait beyond a deadline."""

import contextlib
import socket
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch

from megatron_distkv.address import Address, parse_address
from megatron_distkv.config.endpoint import Endpoint
from megatron_distkv.errors import DistkvError, PeerLost
from megatron_distkv.transport.frame import ERROR_KIND
from megatron_distkv.transport.handshake import introduce
from megatron_distkv.transport.hello import Hello
from megatron_distkv.transport.link import Link, Wire
from megatron_distkv.transport.nixl_link import NixlWire
from megatron_distkv.transport.pool_secret import OPEN_POOL
from megatron_distkv.transport.shared_link import DatagramWire
from megatron_distkv.transport.stream_link import StreamWire, set_options
from megatron_distkv.transport.tls import Tls


class Reply(NamedTuple):
    """`payload` is a view into the mailbox: read it before the next post."""

    header: bytes
    payload: memoryview


class RequestFailed(DistkvError):
    """The peer lives but could not answer; the sentence is its own."""


def connect(
    address: str,
    hello: Hello,
    *,
    peer: str,
    timeout_s: float,
    secret: bytes = OPEN_POOL,
    tls: Tls | None = None,
    rank: int = 0,
) -> "Channel":
    """Open a channel to rank `rank` of an instance (address.py): shared memory on this host, else TCP.

    Raises PeerLost when it is not there, silent, or says no. `timeout_s` holds for each word of the handshake.
    """
    connection: socket.socket | None = None
    try:
        connection = _reach(parse_address(address).of_rank(rank), timeout_s, tls)
        link = introduce(_wire(connection, parse_address(address), timeout_s), hello, secret)
    except (OSError, ValueError, DistkvError) as error:  # ValueError: no address, or a path that no file can have
        if connection is not None:
            connection.close()
        raise PeerLost(peer, f"no channel to {address}: {error}") from error
    return Channel(peer, link)


def _wire(connection: socket.socket, address: Address, timeout_s: float) -> Wire:
    if connection.family is socket.AF_UNIX:
        return DatagramWire(connection, timeout_s)
    is_nixl = address.endpoint is not None and address.endpoint.carrier == "nixl"
    return (NixlWire if is_nixl else StreamWire)(connection, timeout_s)


def _reach(address: Address, timeout_s: float, tls: Tls | None) -> socket.socket:
    if address.unix_path is not None and address.is_here:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.settimeout(timeout_s)
        try:
            connection.connect(address.unix_path)
        except (FileNotFoundError, ConnectionRefusedError, PermissionError):
            connection.close()
            if address.endpoint is None:
                raise
        except BaseException:
            connection.close()
            raise
        else:
            return connection
    if address.endpoint is None:
        raise ValueError("it shares memory on its own host only, which is not this one")
    return _reach_host(address.endpoint, timeout_s, tls)


def _reach_host(endpoint: Endpoint, timeout_s: float, tls: Tls | None) -> socket.socket:
    """Neither side falls back to plain TCP: who could change an address could else read everything."""
    if endpoint.carrier == "tls" and tls is None:
        raise ValueError("it speaks TLS only, and this member has no certificate (network.certificate_file)")
    if tls is not None and endpoint.carrier != "tls":
        raise ValueError("it speaks no TLS, and this member speaks nothing else to other hosts")
    connection = socket.create_connection((endpoint.host, endpoint.port), timeout_s)
    try:
        set_options(connection)
        if tls is not None:
            return tls.connecting.wrap_socket(connection, server_hostname=endpoint.host)
    except BaseException:
        connection.close()
        raise
    return connection


class Channel:
    """One outstanding exchange at a time: `post`, then `wait`. A lost peer stays lost: open a new channel."""

    def __init__(self, peer: str, link: Link) -> None:
        self.peer = peer
        self._link = link
        self._sequence = 0
        self._is_waiting = False
        self.is_open = True

    def post(self, kind: int, header: bytes, payload: Sequence[torch.Tensor] = ()) -> None:
        """Send a message; raises PeerLost, or MessageTooLong before anything is sent."""
        self._require_open()
        if self._is_waiting:
            raise RuntimeError(f"a message to {self.peer} still waits for its answer")
        try:
            self._link.send(self._sequence + 1, kind, header, payload)
        except OSError as error:
            raise self._lose(str(error)) from error
        self._sequence += 1
        self._is_waiting = True

    def wait(self, deadline_s: float) -> Reply:
        """The answer to the posted message; raises PeerLost after `deadline_s` or at EOF, RequestFailed on an error."""
        self._require_open()
        if not self._is_waiting:
            raise RuntimeError(f"nothing was posted to {self.peer}")
        kind, reply = self._receive(time.monotonic() + deadline_s)
        self._is_waiting = False
        if kind == ERROR_KIND:
            raise RequestFailed(f"{self.peer}: {reply.header.decode(errors='replace')}")
        return reply

    def is_answered(self, within_s: float) -> bool:
        """Whether `wait` would return, or raise, at once; nothing is lost by asking."""
        self._require_open()
        try:
            return self._link.is_audible(within_s)
        except OSError:
            return True

    def give_up(self, reason: str) -> PeerLost:
        """The peer is lost, as somebody else has found out."""
        return self._lose(reason)

    def call(self, kind: int, header: bytes, payload: Sequence[torch.Tensor] = (), *, deadline_s: float) -> Reply:
        self.post(kind, header, payload)
        return self.wait(deadline_s)

    def close(self) -> None:
        self.is_open = False
        self._link.close()

    def _receive(self, end_s: float) -> tuple[int, Reply]:
        try:
            frame = self._link.hear(max(1e-3, end_s - time.monotonic()))
            if frame.sequence != self._sequence:
                raise ValueError("it answered out of turn")
            header, payload = self._link.read(frame, max(1e-3, end_s - time.monotonic()))
        except TimeoutError as error:
            raise self._lose("no answer within the deadline") from error
        except (OSError, ValueError) as error:
            raise self._lose(str(error)) from error
        return frame.kind, Reply(header, payload)

    def _lose(self, reason: str) -> PeerLost:
        with contextlib.suppress(OSError):
            self.close()
        return PeerLost(self.peer, reason)

    def _require_open(self) -> None:
        if not self.is_open:
            raise PeerLost(self.peer, "the channel is closed")
