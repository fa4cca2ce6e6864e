"""Carries out a step's moves and pulls on one rank: rBlocks to the creditor's same rank, and back from it."""

from collections.abc import Iterator, Sequence

import msgspec
import torch

from megatron_distkv.attention import HostMemory, Verification
from megatron_distkv.errors import DistkvError, PeerLost
from megatron_distkv.messages import Acknowledge, FetchHeader, MessageKind, StoreHeader, decode
from megatron_distkv.ops import gather_rblocks, scatter_rblocks
from megatron_distkv.peers.peers import Peers
from megatron_distkv.rblock import HOST, loan_name
from megatron_distkv.rmanager import Move, Pull
from megatron_distkv.transport import Reply, TensorSpec, read_tensors


class Migration:
    """`rblocks_per_message` rBlocks fit in one message."""

    def __init__(
        self,
        pool_BLK2ND: torch.Tensor,
        peers: Peers,
        rblocks_per_message: int,
        deadline_s: float,
        host: HostMemory | None = None,
        verification: Verification | None = None,
    ) -> None:
        self._host = host
        self._verification = verification
        self._pool = pool_BLK2ND
        self._peers = peers
        self._rblocks_per_message = rblocks_per_message
        self._deadline_s = deadline_s

    def carry_out(self, moves: Sequence[Move | Pull]) -> dict[str, str]:
        """Do all, in order; returns the creditors that were lost, with the reason.

        Never raises for a peer that is lost or cannot answer: with tensor parallelism every rank must come to the
        same next collective.
        """
        lost: dict[str, str] = {}
        for move in moves:
            if move.creditor in lost:
                continue
            try:
                self._push(move) if isinstance(move, Move) else self._pull(move)
            except DistkvError as error:
                lost[move.creditor] = error.reason if isinstance(error, PeerLost) else str(error)
        return lost

    def _push(self, move: Move) -> None:
        if move.creditor == HOST:
            assert self._host is not None
            data = gather_rblocks(self._pool, torch.tensor(move.local_ids, dtype=torch.int64))
            self._host.store(data, move.remote_ids)
            return
        channel = self._peers.reach(move.peer)
        for local_ids, remote_ids in self._portions(move):
            header = msgspec.msgpack.encode(StoreHeader(move.loan_id, remote_ids))
            data = self._gather(local_ids, from_host=move.from_host)
            _check(channel.call(MessageKind.STORE, header, [data], deadline_s=self._deadline_s), move)
            if self._verification is not None:
                self._verification.note_sent(move.creditor, move.loan_id, remote_ids, data)

    def _gather(self, block_ids: list[int], *, from_host: bool) -> torch.Tensor:
        if from_host:
            assert self._host is not None
            return self._host.load(block_ids)
        data: torch.Tensor = gather_rblocks(self._pool, torch.tensor(block_ids, dtype=torch.int64))
        return data

    def _pull(self, pull: Pull) -> None:
        channel = self._peers.reach(pull.peer)
        for local_ids, remote_ids in self._portions(pull):
            header = msgspec.msgpack.encode(FetchHeader(pull.loan_id, remote_ids))
            reply = channel.call(MessageKind.FETCH, header, deadline_s=self._deadline_s)
            _check(reply, pull)
            spec = TensorSpec((len(remote_ids), *self._pool.shape[1:]), self._pool.dtype)
            (data,) = read_tensors(reply.payload, [spec])
            if self._verification is not None:
                self._verification.check_returned(pull.creditor, remote_ids, data)
            scatter_rblocks(data, self._pool, torch.tensor(local_ids, dtype=torch.int64))

    def _portions(self, move: Move | Pull) -> Iterator[tuple[list[int], list[int]]]:
        size = self._rblocks_per_message
        for start in range(0, len(move.local_ids), size):
            yield move.local_ids[start : start + size], move.remote_ids[start : start + size]


def _check(reply: Reply, move: Move | Pull) -> None:
    refusal = decode(reply.header, Acknowledge).refusal
    if refusal is not None:
        raise PeerLost(move.creditor, f"refused rBlocks of loan {loan_name(move.loan_id)}: {refusal.value}")
