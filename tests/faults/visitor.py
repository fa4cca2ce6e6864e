"""A member of the pool that says to another one whatever a test wants, on real channels: by itself, or as a debtor."""

from typing import NamedTuple

import msgspec
import torch

from megatron_distkv.kvcache.rblock_pool import rank_pool, torch_dtype
from megatron_distkv.kvcache.rblock_shape import RBlockShape
from megatron_distkv.ledger import DebtLedger
from megatron_distkv.messages import (
    Acknowledge,
    CommitHeader,
    FetchHeader,
    InheritHeader,
    LendHeader,
    LendReply,
    MessageKind,
    PrepareHeader,
    QueryHeader,
    QueryShare,
    Refusal,
    ReleaseHeader,
    RequestKV,
    StoreHeader,
)
from megatron_distkv.rblock import InstanceId, LoanId, loan_key, new_loan_id
from megatron_distkv.transport import OPEN_POOL, Tls, connect
from tests.pool.members import info
from tests.transport.raw_peer import hello

DEADLINE_S = 30.0


class Way(NamedTuple):
    """How a channel comes to a creditor: `address` is the ledger's word for it."""

    address: str
    shape: RBlockShape
    secret: bytes = OPEN_POOL
    tls: Tls | None = None


class Visitor:
    """Rank `rank` of `num_ranks` of a member that calls itself `name`; `with` closes its channel."""

    def __init__(self, way: Way, name: str, epoch: int = 1, rank: int = 0, num_ranks: int = 1) -> None:
        self.name, self.epoch = name, epoch
        self.shape = msgspec.structs.replace(way.shape, tensor_parallel=num_ranks)
        self._step = 0
        said = hello(
            instance_id=name, epoch=epoch, pool="default", rank=rank, num_ranks=num_ranks,
            request_bytes=1 << 20, reply_bytes=1 << 20,
        )  # fmt: skip
        self._channel = connect(
            way.address, said, peer="creditor", timeout_s=DEADLINE_S, secret=way.secret, tls=way.tls
        )

    def __enter__(self) -> "Visitor":
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def kv(self, count: int, seed: int = 0) -> torch.Tensor:
        """Bytes as this rank would send of `count` rBlocks, none of them zero."""
        like = rank_pool(self.shape, count).tensor_BLK2ND
        generator = torch.Generator().manual_seed(seed)
        if like.dtype is torch.uint8:
            return torch.randint(1, 60, like.shape, generator=generator, dtype=torch.uint8)
        return torch.rand(like.shape, generator=generator).to(like.dtype) + 1

    # ------------------------------------------------------------------ what it asks

    def store(self, loan_id: str, block_ids: list[int], data: torch.Tensor) -> Refusal | None:
        return self._ask(MessageKind.STORE, StoreHeader(loan_id, block_ids), [data])[0]

    def fetch(self, loan_id: str, block_ids: list[int]) -> tuple[Refusal | None, bytes]:
        return self._ask(MessageKind.FETCH, FetchHeader(loan_id, block_ids))

    def query(self, loan_ids: list[str], block_ids: list[int]) -> tuple[Refusal | None, bytes]:
        self._step += 1
        q_THD = torch.zeros(1, self.shape.query_heads_per_rank, self.shape.head_dim, dtype=torch_dtype(self.shape))
        return self._ask(MessageKind.QUERY, QueryHeader(self._step, 0, [QueryShare(loan_ids, block_ids, 1)]), [q_THD])

    def later_layer(self, step: int) -> tuple[Refusal | None, bytes]:
        """Of a step whose first layer somebody has asked for."""
        return self._ask(MessageKind.QUERY, QueryHeader(step, 1))

    def release(self, loan_id: str) -> Refusal | None:
        return self._ask(MessageKind.RELEASE, ReleaseHeader(loan_id, self.name))[0]

    def lend(self, loan_id: str, count: int) -> LendReply:
        return self._ask_for_rblocks(MessageKind.LEND, LendHeader(loan_id, self.name, self.epoch, count))

    def inherit(self, loan_id: str, new_loan_id: str) -> LendReply:
        return self._ask_for_rblocks(MessageKind.INHERIT, InheritHeader(loan_id, new_loan_id, self.epoch))

    def prepare(self, handover_id: str, count: int) -> LendReply:
        return self._ask_for_rblocks(MessageKind.PREPARE, PrepareHeader(handover_id, count))

    def commit(self, handover_id: str, here: dict[int, int]) -> Refusal | None:
        num_tokens = len(here) * self.shape.rblock_size
        header = CommitHeader(handover_id, num_tokens, 0, num_tokens, [], 1, 0.0, RequestKV(), here, [])
        return self._ask(MessageKind.COMMIT, header)[0]

    def _ask(
        self, kind: MessageKind, header: msgspec.Struct, payload: list[torch.Tensor] | None = None
    ) -> tuple[Refusal | None, bytes]:
        reply = self._channel.call(kind, msgspec.msgpack.encode(header), payload or [], deadline_s=DEADLINE_S)
        return msgspec.msgpack.decode(reply.header, type=Acknowledge).refusal, bytes(reply.payload)

    def _ask_for_rblocks(self, kind: MessageKind, header: msgspec.Struct) -> LendReply:
        reply = self._channel.call(kind, msgspec.msgpack.encode(header), deadline_s=DEADLINE_S)
        return msgspec.msgpack.decode(reply.header, type=LendReply)


def join(ledger: DebtLedger, name: str) -> int:
    """Its epoch, as a member that owes and lends nothing; it never beats, and lives as long as a test."""
    return ledger.register(InstanceId(name), "unix:/nowhere", 1, 1, 600.0, info=info(role="lender")).epoch


def borrow(ledger: DebtLedger, visitor: Visitor, creditor: str, count: int) -> tuple[LoanId, list[int]]:
    """A loan of its own, by the book; and its rBlocks at the creditor."""
    loan_id = new_loan_id(visitor.name, visitor.epoch, 1)
    there = next(x for x in ledger.snapshot().instances if x.instance == creditor)
    me = InstanceId(visitor.name)
    refusal = ledger.borrow(loan_key(loan_id), me, visitor.epoch, there.instance, there.epoch, count, DEADLINE_S)
    assert refusal is None
    reply = visitor.lend(loan_id, count)
    assert reply.refusal is None
    return loan_id, list(reply.block_ids)
