"""The answering side: MicroAttention over rBlocks that others borrowed, and taking in the rBlocks that they send."""

import threading
from dataclasses import dataclass

import msgspec
import torch

from megatron_distkv import metrics
from megatron_distkv.attention.debtor import wire_dtype
from megatron_distkv.attention.fixed_order.leaves import FixedIndex, index_in_fixed_order
from megatron_distkv.attention.head_share import HeadShare, attend_heads
from megatron_distkv.attention.loan_table import Access, LoanTable
from megatron_distkv.attention.query_limiter import QueryLimiter
from megatron_distkv.attention.shares import ShareIndex, index_shares, measure_query_us
from megatron_distkv.clock import Clock
from megatron_distkv.errors import DistkvError
from megatron_distkv.log import get_logger
from megatron_distkv.messages import (
    Acknowledge,
    FetchHeader,
    Holder,
    QueryHeader,
    QueryShare,
    Refusal,
    Scoring,
    StoreHeader,
    decode,
)
from megatron_distkv.ops import Int8RBlocks, gather_rblocks, readable, scatter_rblocks
from megatron_distkv.transport import Answer, ChannelRequest, Hello, TensorSpec, read_tensors

logger = get_logger(__name__)


@dataclass
class _PreparedQuery:
    """A step's question, checked once and used by all its layers that score alike."""

    step: int
    shares: list[QueryShare]
    version: int  # of the loan table when it was checked
    index: ShareIndex | FixedIndex


class Creditor:
    """Called by channel threads, one per debtor. Reads only rBlocks that the loan table grants to who asks."""

    def __init__(
        self,
        pool_BLK2ND: torch.Tensor,
        loan_table: LoanTable,
        num_query_heads: int,
        model_dtype: torch.dtype,
        scale: float,
        clock: Clock,
        limiter: QueryLimiter | None = None,
        *,
        rank: int = 0,
        num_ranks: int = 1,
        head_dim: int | None = None,
    ) -> None:
        """`pool_BLK2ND` holds the heads of rank `rank` of `num_ranks`. Debtors may be cut otherwise.

        `head_dim`: needed of a pool in int8 (ops.int8_kv), which does not tell.
        """
        self._holds = HeadShare(rank, num_ranks, pool_BLK2ND.shape[2] * num_ranks)
        self._group = num_query_heads // pool_BLK2ND.shape[2]
        self._limiter = limiter or QueryLimiter(1.0, clock)
        self._pool = pool_BLK2ND
        self._head_dim = head_dim or pool_BLK2ND.shape[-1]
        self._kv = readable(pool_BLK2ND, self._head_dim)
        self._loans = loan_table
        self._num_query_heads = num_query_heads
        self._model_dtype = model_dtype
        self._scale = scale
        self._clock = clock
        # By the nonce of a channel's hello, by how scores are made and which part of the question it is.
        self._prepared: dict[bytes, dict[tuple[Scoring, int], _PreparedQuery]] = {}
        self._lock = threading.Lock()

    def warm_up(self) -> float:
        """Do everything once, before any rBlock is in use; returns what a query costs here (`measure_query_us`).

        The first call of a torch op imports a compiler, and a backend may compile a kernel: seconds that would count
        against the first debtor's deadline.
        """
        zero = torch.zeros(1, dtype=torch.int64)
        scatter_rblocks(gather_rblocks(self._pool, zero), self._pool, zero)
        return measure_query_us(
            self._pool, self._num_query_heads, self._head_dim, self._model_dtype, self._scale, self._clock
        )

    def query(self, hello: Hello, request: ChannelRequest) -> Answer:
        """MicroAttention of one layer over the debtor's rBlocks here (contract: messages.QueryHeader)."""
        header = decode(request.header, QueryHeader)
        if header.layer >= self._pool.shape[1]:
            raise DistkvError(f"layer {header.layer} of a pool with {self._pool.shape[1]}")
        asker, heads = asker_of(hello, request), self._heads_of(hello)
        prepared = self._prepare(hello.nonce, header, asker, heads)
        if isinstance(prepared, Refusal):
            return _acknowledge(prepared)
        shape = (prepared.index.num_rows, (heads.stop - heads.start) * self._group, self._head_dim)
        (q_THD,) = read_tensors(request.payload, [TensorSpec(shape, self._model_dtype)])
        with self._limiter.turn() as throttled_s:
            out, lse = attend_heads(q_THD, self._kv, header.layer, prepared.index, self._scale, heads)
        if self._loans.version != prepared.version and not self._may_query(asker, prepared.shares, heads):
            return _acknowledge(Refusal.UNKNOWN_LOAN)  # a loan ended while we computed: the rBlocks may be another's
        dtype = torch.float32 if header.num_partials else wire_dtype(self._model_dtype)
        return Answer(msgspec.msgpack.encode(Acknowledge(None, throttled_s)), [out.to(dtype), lse])

    def store(self, hello: Hello, request: ChannelRequest) -> Answer:
        """Take in migrated rBlocks (contract: messages.StoreHeader)."""
        header = decode(request.header, StoreHeader)
        if len(set(header.block_ids)) < len(header.block_ids):
            raise DistkvError("a store names an rBlock twice")
        asker, heads = asker_of(hello, request), self._heads_of(hello)
        pool = self._pool[:, :, heads]
        spec = TensorSpec((len(header.block_ids), *pool.shape[1:]), pool.dtype)
        (data,) = read_tensors(request.payload, [spec])
        with self._loans.held():
            access = self._loans.may_write(asker, [header.loan_id], header.block_ids)
            if not _is_granted(access, "store", asker):
                return _acknowledge(Refusal.UNKNOWN_LOAN)
            _scatter(data, pool, torch.tensor(header.block_ids, dtype=torch.int64))
            self._loans.note_stored(header.loan_id, header.block_ids, heads, self._pool.shape[2])
        return _acknowledge(None)

    def fetch(self, hello: Hello, request: ChannelRequest) -> Answer:
        """Give borrowed rBlocks back (contract: messages.FetchHeader)."""
        header = decode(request.header, FetchHeader)
        asker, heads = asker_of(hello, request), self._heads_of(hello)
        with self._loans.held():
            access = self._loans.may_read(asker, [header.loan_id], header.block_ids, heads)
            if not _is_granted(access, "fetch", asker):
                return _acknowledge(Refusal.UNKNOWN_LOAN)
            data = _gather(self._pool[:, :, heads], torch.tensor(header.block_ids, dtype=torch.int64))
        return Answer(msgspec.msgpack.encode(Acknowledge()), [data])

    def forget(self, hello: Hello) -> None:
        """The debtor's channel is gone."""
        with self._lock:
            self._prepared.pop(hello.nonce, None)

    def _heads_of(self, hello: Hello) -> slice:
        """This rank's heads that are the debtor rank's too; raises DistkvError where there are none."""
        num_heads = self._holds.num_kv_heads
        if num_heads % hello.num_ranks or hello.rank >= hello.num_ranks:
            raise DistkvError(f"rank {hello.rank} of {hello.num_ranks} has no part of {num_heads} KV heads")
        heads = self._holds.common_with(HeadShare(hello.rank, hello.num_ranks, num_heads))
        if heads.start == heads.stop:
            raise DistkvError(f"rank {hello.rank} of {hello.num_ranks} has no KV heads at this rank")
        return heads

    def _prepare(self, channel: bytes, header: QueryHeader, asker: Holder, heads: slice) -> _PreparedQuery | Refusal:
        asked = (header.scoring, header.part)
        with self._lock:
            of_step = {key: x for key, x in self._prepared.get(channel, {}).items() if x.step == header.step}
        if header.shares is None:
            return of_step.get(asked, Refusal.UNKNOWN_LOAN)
        ways = {scoring for scoring, _ in (*of_step, asked)}
        if len(ways) > self._pool.shape[1]:
            raise DistkvError(f"{len(ways)} ways of scoring in {self._pool.shape[1]} layers")
        version = self._loans.version
        if not self._may_query(asker, header.shares, heads):
            return Refusal.UNKNOWN_LOAN
        prepared = _PreparedQuery(header.step, header.shares, version, self._index(header, header.shares))
        with self._lock:
            self._prepared[channel] = {**of_step, asked: prepared}
        return prepared

    def _index(self, header: QueryHeader, shares: list[QueryShare]) -> ShareIndex | FixedIndex:
        if header.num_partials == 0:
            return index_shares(shares, header.scoring)
        numbers_BLK2ND = self._kv.pool_BLK2ND if isinstance(self._kv, Int8RBlocks) else self._kv
        return index_in_fixed_order(shares, header.scoring, numbers_BLK2ND.shape[4], header.num_partials)

    def _may_query(self, asker: Holder, shares: list[QueryShare], heads: slice) -> bool:
        each = (self._loans.may_read(asker, share.loan_ids, share.block_ids, heads) for share in shares)
        return all(_is_granted(access, "query", asker) for access in each)


def asker_of(hello: Hello, request: ChannelRequest) -> Holder:
    """Who asks, as the loans know it."""
    return Holder(hello.instance_id, request.certificate)


def _is_granted(access: Access, kind: str, asker: Holder) -> bool:
    if access is Access.GRANTED:
        return True
    metrics.REFUSED_ACCESSES.labels(kind, access.value).inc()
    if access is not Access.ENDED:
        why = "memory of another" if access is Access.FOREIGN else "memory in which it has stored nothing"
        logger.warning("refusing a %s of %s: it names %s", kind, asker.name, why)
    return False


def _gather(pool_BLK2ND: torch.Tensor, block_ids: torch.Tensor) -> torch.Tensor:
    """Whole rBlocks by the kernel; some of their heads only by torch."""
    return gather_rblocks(pool_BLK2ND, block_ids) if pool_BLK2ND.is_contiguous() else pool_BLK2ND[block_ids]


def _scatter(data_MLK2ND: torch.Tensor, pool_BLK2ND: torch.Tensor, block_ids: torch.Tensor) -> None:
    if pool_BLK2ND.is_contiguous():
        scatter_rblocks(data_MLK2ND, pool_BLK2ND, block_ids)
    else:
        pool_BLK2ND[block_ids] = data_MLK2ND


def _acknowledge(refusal: Refusal | None) -> Answer:
    return Answer(msgspec.msgpack.encode(Acknowledge(refusal)))
