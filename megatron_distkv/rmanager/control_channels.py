"""Channels for short questions about loans, beside those of attention: jobs use them while the engine computes."""

import threading
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec

from megatron_distkv.clock import Clock
from megatron_distkv.errors import PeerLost
from megatron_distkv.messages import MessageKind, decode
from megatron_distkv.pool import Peer, Quarantine
from megatron_distkv.rmanager.peers import MailboxSizes, Peers
from megatron_distkv.transport import Channel

_Reply = TypeVar("_Reply")
# A question names rBlocks, an answer lists them: a hundred thousand fit.
_SIZES = MailboxSizes(512 << 10, 512 << 10)
# Peers whose channels are kept open; those that nothing was asked of for longest are closed.
MAX_PEERS = 64
# Channels to one peer that are kept open: a creditor that asks a ledger far away answers several at one time.
MAX_KEPT = 4


@dataclass
class _Lines:
    """To one life of a peer. `free`: channels that nobody asks over at the moment."""

    peer: Peer
    free: list[Channel] = field(default_factory=list)


class ControlChannels:
    """To the leaders of peers, opened when needed. Any thread may ask; each question has a channel to itself."""

    def __init__(self, peers: Peers, deadline_s: float, clock: Clock) -> None:
        self._peers = peers
        self._clock = clock
        self._silent = Quarantine(clock)  # or each question to one that hangs would wait for its own deadline
        self._deadline_s = deadline_s
        self._lines: dict[str, _Lines] = {}
        self._lock = threading.Lock()
        self._is_closed = False

    def ask(self, peer: Peer, kind: MessageKind, header: msgspec.Struct, answer: type[_Reply]) -> _Reply:
        """Raises DistkvError: `peer` is gone, silent for `deadline_s`, or cannot answer."""
        if self._peers.lost.holds(peer.instance):
            raise PeerLost(peer.instance, "lost a short while ago")
        if self._silent.holds(peer.instance):
            raise PeerLost(peer.instance, "did not answer a question a moment ago")
        began_s, data = self._clock.monotonic_s(), msgspec.msgpack.encode(header)
        try:
            return self._ask(peer, self._take(peer), kind, data, answer)
        except PeerLost:
            if self._clock.monotonic_s() - began_s < self._deadline_s / 2:  # a kept channel has ended meanwhile
                return self._ask(peer, None, kind, data, answer)
            self._silent.put(peer.instance, self._deadline_s)
            raise

    def _ask(self, peer: Peer, kept: Channel | None, kind: MessageKind, data: bytes, answer: type[_Reply]) -> _Reply:
        """All questions are idempotent: one that is asked again gets the same answer."""
        channel = kept or self._peers.dial(peer, _SIZES, self._deadline_s)
        try:
            reply = channel.call(kind, data, deadline_s=self._deadline_s)
            return decode(reply.header, answer)
        finally:
            if not channel.is_open or not self._give_back(peer, channel):
                channel.close()

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            channels = [channel for lines in self._lines.values() for channel in lines.free]
            self._lines.clear()
        for channel in channels:
            channel.close()

    def _take(self, peer: Peer) -> Channel | None:
        """A free channel to this life of the peer; those to an earlier one are closed."""
        with self._lock:
            lines = self._lines.pop(peer.instance, None)
            old = lines.free if lines is not None and lines.peer.epoch != peer.epoch else []
            lines = _Lines(peer) if lines is None or lines.peer.epoch != peer.epoch else lines
            self._lines[peer.instance] = lines  # the latest last
            if len(self._lines) > MAX_PEERS:
                old += self._lines.pop(next(iter(self._lines))).free
            channel = lines.free.pop() if lines.free else None
        for other in old:
            other.close()
        return channel

    def _give_back(self, peer: Peer, channel: Channel) -> bool:
        """False: enough are kept, or this life of the peer is over."""
        with self._lock:
            lines = self._lines.get(peer.instance)
            is_kept = not self._is_closed and lines is not None and lines.peer.epoch == peer.epoch
            if not is_kept or lines is None or len(lines.free) >= MAX_KEPT:
                return False
            lines.free.append(channel)
            return True
