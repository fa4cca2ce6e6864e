"""Channels for short questions about loans, beside those of attention: jobs use them while the engine computes."""

import threading
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec

from megatron_distkv.errors import PeerLost
from megatron_distkv.messages import MessageKind, decode
from megatron_distkv.pool import Peer
from megatron_distkv.rmanager.peers import MailboxSizes, Peers
from megatron_distkv.transport import Channel

_Reply = TypeVar("_Reply")
# A question names rBlocks, an answer lists them: a hundred thousand fit.
_SIZES = MailboxSizes(512 << 10, 512 << 10)
# Channels to peers that nothing is asked of any more are closed, the oldest first.
MAX_OPEN = 64


@dataclass
class _Line:
    peer: Peer
    lock: threading.Lock = field(default_factory=threading.Lock)
    channel: Channel | None = None
    num_failures: int = 0


class ControlChannels:
    """One to the leader of each peer, opened when first needed. Any thread may ask, one at a time each peer."""

    def __init__(self, peers: Peers, deadline_s: float) -> None:
        self._peers = peers
        self._deadline_s = deadline_s
        self._lines: dict[str, _Line] = {}
        self._lock = threading.Lock()

    def ask(self, peer: Peer, kind: MessageKind, header: msgspec.Struct, answer: type[_Reply]) -> _Reply:
        """Raises DistkvError: `peer` is gone, silent for `deadline_s`, or cannot answer."""
        line = self._line_to(peer)
        num_failures = line.num_failures
        with line.lock:
            if line.num_failures != num_failures:  # each would wait for its own deadline, one after the other
                raise PeerLost(peer.instance, "did not answer a question that was asked before")
            if self._peers.lost.holds(peer.instance):
                raise PeerLost(peer.instance, "lost a short while ago")
            try:
                if line.channel is None or not line.channel.is_open:
                    line.channel = self._peers.dial(peer, _SIZES, self._deadline_s)
                reply = line.channel.call(kind, msgspec.msgpack.encode(header), deadline_s=self._deadline_s)
                return decode(reply.header, answer)
            except PeerLost:
                line.channel = None
                line.num_failures += 1
                raise

    def close(self) -> None:
        with self._lock:
            lines = list(self._lines.values())
            self._lines.clear()
        for line in lines:
            _close(line)

    def _line_to(self, peer: Peer) -> _Line:
        """Of this life of the peer; what led to an earlier one is closed."""
        with self._lock:
            line = self._lines.pop(peer.instance, None)
            replaced = [line] if line is not None and line.peer.epoch != peer.epoch else []
            line = _Line(peer) if line is None or replaced else line
            self._lines[peer.instance] = line  # the latest last
            if len(self._lines) > MAX_OPEN:
                replaced.append(self._lines.pop(next(iter(self._lines))))
        for old in replaced:
            _close(old)
        return line


def _close(line: _Line) -> None:
    with line.lock:
        if line.channel is not None:
            line.channel.close()
            line.channel = None
