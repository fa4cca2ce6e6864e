"""Channels of one rank to the same rank of other instances, opened when first needed."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from megatron_distkv.errors import DistkvError, PeerLost
from megatron_distkv.log import get_logger
from megatron_distkv.rmanager.identity import Identity
from megatron_distkv.transport import OPEN_POOL, Channel, Hello, connect
from megatron_distkv.transport.hello import PROTOCOL_VERSION

logger = get_logger(__name__)


@dataclass(frozen=True)
class MailboxSizes:
    """Bytes that one message to a creditor, and its answer, may need."""

    request_bytes: int
    reply_bytes: int


# Of a channel that only says hello.
_NO_ROOM = MailboxSizes(4096, 4096)


class Peers(Mapping[str, Channel]):
    """Open channels by peer. Only the engine's thread uses them. A peer's address holds the placeholder `{rank}`."""

    def __init__(
        self,
        pool: str,
        identity: Identity,
        rank: int,
        sizes: MailboxSizes,
        deadline_s: float,
        secret: bytes = OPEN_POOL,
    ) -> None:
        self._pool = pool
        self._secret = secret
        self._identity = identity
        self._rank = rank
        self._sizes = sizes
        self._deadline_s = deadline_s
        self._channels: dict[str, Channel] = {}
        self._addresses: dict[str, str] = {}
        self._shunned_until_s: dict[str, float] = {}

    def reach(self, peer: str, address: str) -> Channel:
        """The channel to `peer`, opened if there is none; raises PeerLost, at once for a shunned peer."""
        if self.shuns(peer):
            raise PeerLost(peer, "lost a moment ago")
        channel = self._channels.get(peer)
        if channel is not None and channel.is_open:
            return channel
        channel = self._connect(peer, address, self._sizes, self._deadline_s)
        logger.info("connected to %s", peer)
        self._channels[peer] = channel
        self._addresses[peer] = address
        return channel

    def is_alive(self, peer: str, within_s: float) -> bool:
        """Whether it greets us, each word of the greeting within this time: on a connection of its own."""
        try:
            self._connect(peer, self._addresses[peer], _NO_ROOM, within_s).close()
        except (PeerLost, KeyError):
            return False
        return True

    def _connect(self, peer: str, address: str, sizes: MailboxSizes, timeout_s: float) -> Channel:
        hello = Hello(
            protocol_version=PROTOCOL_VERSION,
            pool=self._pool,
            instance_id=self._identity.instance,
            epoch=self._identity.epoch,
            rank=self._rank,
            request_bytes=sizes.request_bytes,
            reply_bytes=sizes.reply_bytes,
        )
        try:
            mine = address.replace("{rank}", str(self._rank))  # not format(): the ledger's word is not our code
            return connect(mine, hello, peer=peer, timeout_s=timeout_s, secret=self._secret)
        except PeerLost:
            raise
        except (OSError, DistkvError) as error:
            raise PeerLost(peer, f"cannot connect: {error}") from error

    def shun(self, peer: str, for_s: float) -> None:
        """Leave a lost peer alone for a while: one that hangs must not cost a deadline at every attempt."""
        self._shunned_until_s[peer] = time.monotonic() + for_s
        self._drop(peer)

    def shuns(self, peer: str) -> bool:
        return self._shunned_until_s.get(peer, 0.0) > time.monotonic()

    def _drop(self, peer: str) -> None:
        channel = self._channels.pop(peer, None)
        if channel is not None:
            channel.close()

    def close(self) -> None:
        for peer in list(self._channels):
            self._drop(peer)

    def __getitem__(self, peer: str) -> Channel:
        return self._channels[peer]

    def __iter__(self) -> Iterator[str]:
        return iter(self._channels)

    def __len__(self) -> int:
        return len(self._channels)
