"""Channels for short questions about loans, beside those of attention: jobs use them while the engine computes."""

import threading
from typing import TypeVar

import msgspec

from megatron_distkv.clock import Clock
from megatron_distkv.errors import PeerLost
from megatron_distkv.messages import MessageKind, decode
from megatron_distkv.peers.peers import MailboxSizes, Peers
from megatron_distkv.pool import Peer, Quarantine
from megatron_distkv.transport import Channel

_Reply = TypeVar("_Reply")
# A question names rBlocks, an answer lists them: a hundred thousand fit.
_SIZES = MailboxSizes(512 << 10, 512 << 10)
# Peers to which a channel is kept open; the one that nothing was asked of for longest is closed. One for each: a second
# question at the same time dials, which costs a few milliseconds, where a channel kept costs both sides memory.
MAX_PEERS = 64


class ControlChannels:
    """To the leaders of peers, opened when needed. Any thread may ask; each question has a channel to itself."""

    def __init__(self, peers: Peers, deadline_s: float, clock: Clock) -> None:
        self._peers = peers
        self._clock = clock
        self._silent = Quarantine(clock)  # or each question to one that hangs would wait for its own deadline
        self._deadline_s = deadline_s
        self._kept: dict[str, tuple[Peer, Channel]] = {}  # nobody asks over them at the moment
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
            channels = [channel for _, channel in self._kept.values()]
            self._kept.clear()
        for channel in channels:
            channel.close()

    def _take(self, peer: Peer) -> Channel | None:
        """The kept channel, if it is to this life of the peer; one to an earlier life is closed."""
        with self._lock:
            life, channel = self._kept.pop(peer.instance, (peer, None))
        if channel is not None and life.epoch != peer.epoch:
            channel.close()
            return None
        return channel

    def _give_back(self, peer: Peer, channel: Channel) -> bool:
        """False: one is kept already."""
        oldest = None
        with self._lock:
            if self._is_closed or peer.instance in self._kept:
                return False
            self._kept[peer.instance] = (peer, channel)  # the latest last
            if len(self._kept) > MAX_PEERS:
                _, oldest = self._kept.pop(next(iter(self._kept)))
        if oldest is not None:
            oldest.close()
        return True
