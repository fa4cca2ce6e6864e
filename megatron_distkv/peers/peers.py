"""Channels of one rank to the same rank of other instances, opened when first needed."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from megatron_distkv.address import parse_address
from megatron_distkv.attention import CreditorChannel, HeadShare, Part, SplitChannel
from megatron_distkv.clock import Clock
from megatron_distkv.errors import PeerLost
from megatron_distkv.kvcache.rblock_pool import rank_pool
from megatron_distkv.kvcache.rblock_shape import RBlockShape
from megatron_distkv.log import get_logger
from megatron_distkv.pool import Identity, Peer, Quarantine
from megatron_distkv.transport import OPEN_POOL, Channel, Hello, TensorSpec, Tls, connect
from megatron_distkv.transport.hello import PROTOCOL_VERSION

logger = get_logger(__name__)


@dataclass(frozen=True)
class MailboxSizes:
    """Bytes that one message to a creditor, and its answer, may need."""

    request_bytes: int
    reply_bytes: int


# Of a channel that only says hello.
_NO_ROOM = MailboxSizes(4096, 4096)


class Peers(Mapping[str, CreditorChannel]):
    """Open channels by peer, each to one life of it. Only the engine's thread uses them.

    A peer of another tensor parallelism is reached at all of its ranks that hold some of this rank's heads.
    """

    def __init__(
        self,
        pool: str,
        identity: Identity,
        clock: Clock,
        rank: int,
        sizes: MailboxSizes,
        deadline_s: float,
        secret: bytes = OPEN_POOL,
        tls: Tls | None = None,
        shape: RBlockShape | None = None,
    ) -> None:
        """`shape`: of this instance's rBlocks; without one all members have as many ranks."""
        self._pool = pool
        self._secret = secret
        self._identity = identity
        self._rank = rank
        self._sizes = sizes
        self._tls = tls
        self._shape = shape
        self._deadline_s = deadline_s
        self._clock = clock
        self.lost = Quarantine(clock)
        """Peers that were lost a short while ago: one that hangs must not cost a deadline at every attempt."""
        self._channels: dict[str, CreditorChannel] = {}
        self._lives: dict[str, Peer] = {}  # whose channels they are

    def reach(self, peer: Peer) -> CreditorChannel:
        """The channel to this life of `peer`, opened if there is none; raises PeerLost, at once in quarantine."""
        name = peer.instance
        if self.lost.holds(name):
            raise PeerLost(name, "lost a short while ago")
        channel = self._channels.get(name)
        if channel is not None and channel.is_open and self._lives[name].epoch == peer.epoch:
            return channel
        self._drop(name)
        channel = self._open(name, peer.address)
        logger.info("connected to %s", name)
        self._channels[name] = channel
        self._lives[name] = peer
        return channel

    def dial(self, peer: Peer, sizes: MailboxSizes, timeout_s: float | None = None) -> Channel:
        """A new channel to the leader of `peer`, nobody's but the caller's; any thread may call it. Raises PeerLost."""
        return self._connect(peer.instance, peer.address, 0, sizes, timeout_s or self._deadline_s)

    def is_alive(self, peer: str, within_s: float) -> bool:
        """Whether all its ranks greet us, each word of the greeting within this time: on connections of their own."""
        try:
            address = self._lives[peer].address
            for rank, _ in self._ranks_of(address):
                self._connect(peer, address, rank, _NO_ROOM, within_s).close()
        except (PeerLost, KeyError):
            return False
        return True

    def _open(self, peer: str, address: str) -> CreditorChannel:
        parts: list[Part] = []
        try:
            for rank, kv_heads in self._ranks_of(address):
                parts.append(Part(self._connect(peer, address, rank, self._sizes, self._deadline_s), kv_heads))
        except BaseException as error:
            for part in parts:
                part.channel.close()
            if isinstance(error, OSError | ValueError):
                raise PeerLost(peer, f"cannot connect: {error}") from error
            raise
        return parts[0].channel if len(parts) == 1 else SplitChannel(parts, self._rblock, self._clock)

    def _ranks_of(self, address: str) -> Iterator[tuple[int, slice]]:
        """The peer's ranks that hold some of this rank's KV heads, and which; raises ValueError."""
        num_ranks, shape = parse_address(address).num_ranks, self._shape
        if shape is None or num_ranks == shape.tensor_parallel:
            yield self._rank, slice(0)
            return
        if shape.num_kv_heads % num_ranks:
            raise ValueError(f"{num_ranks} ranks cannot share {shape.num_kv_heads} KV heads")
        mine = HeadShare(self._rank, shape.tensor_parallel, shape.num_kv_heads)
        for rank in range(num_ranks):
            kv_heads = mine.common_with(HeadShare(rank, num_ranks, shape.num_kv_heads))
            if kv_heads.start < kv_heads.stop:
                yield rank, kv_heads

    @property
    def _rblock(self) -> TensorSpec:
        assert self._shape is not None
        one_BLK2ND = rank_pool(self._shape, 1).tensor_BLK2ND
        return TensorSpec(tuple(one_BLK2ND.shape[1:]), one_BLK2ND.dtype)

    def _connect(self, peer: str, address: str, rank: int, sizes: MailboxSizes, timeout_s: float) -> Channel:
        hello = Hello(
            protocol_version=PROTOCOL_VERSION,
            pool=self._pool,
            instance_id=self._identity.instance,
            epoch=self._identity.epoch,
            rank=self._rank,
            num_ranks=1 if self._shape is None else self._shape.tensor_parallel,
            request_bytes=sizes.request_bytes,
            reply_bytes=sizes.reply_bytes,
        )
        return connect(address, hello, peer=peer, timeout_s=timeout_s, secret=self._secret, tls=self._tls, rank=rank)

    def give_up(self, peer: str, for_s: float) -> None:
        """It is lost: leave it alone for a while."""
        self.lost.put(peer, for_s)
        self._drop(peer)

    def _drop(self, peer: str) -> None:
        self._lives.pop(peer, None)
        channel = self._channels.pop(peer, None)
        if channel is not None:
            channel.close()

    def close(self) -> None:
        for peer in list(self._channels):
            self._drop(peer)

    def __getitem__(self, peer: str) -> CreditorChannel:
        return self._channels[peer]

    def __iter__(self) -> Iterator[str]:
        return iter(self._channels)

    def __len__(self) -> int:
        return len(self._channels)
