"""The leader's side of its own tensor-parallel ranks: one channel per follower for steps, one for grants."""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from megatron_distkv.engine.addresses import control_address
from megatron_distkv.engine.batch import StepPlan, StepReply
from megatron_distkv.engine.plan_stream import PlanSender
from megatron_distkv.errors import PeerLost, RankLost
from megatron_distkv.messages import (
    Counted,
    Counts,
    GrantHeader,
    Holder,
    MessageKind,
    Revoked,
    RevokeHeader,
    TransferHeader,
    decode,
)
from megatron_distkv.rblock import InstanceId
from megatron_distkv.transport import PROTOCOL_VERSION, Channel, Hello, connect

# Steps carry the tokens and spans of a whole batch; nothing but a header travels.
STEP_BYTES = 16 << 20
REPLY_BYTES = 1 << 20
# A follower computes what the leader computes: only a dead one takes longer than this.
STEP_DEADLINE_S = 600.0
GRANT_DEADLINE_S = 30.0


class FollowerRanks:
    """Ranks 1 .. size - 1, over channels that only this instance's `secret` opens.

    A lost follower raises RankLost, and the instance ends: no rank can go on alone.
    """

    def __init__(self, run_dir: Path, instance: InstanceId, pool: str, size: int, secret: bytes) -> None:
        self._lock = threading.Lock()  # grants come from channel threads
        self._plans = PlanSender()
        self._steps = [_connect(run_dir, instance, pool, rank, secret) for rank in range(1, size)]
        self._grants = [_connect(run_dir, instance, pool, rank, secret) for rank in range(1, size)]

    def begin_step(self, plan: StepPlan) -> None:
        header = self._plans.encode(plan)
        with _lost_for_good():
            for channel in self._steps:
                channel.post(MessageKind.STEP, header)

    def end_step(self) -> StepReply:
        """Creditors that any follower lost."""
        lost: dict[str, str] = {}
        wrong: set[str] = set()
        for channel in self._steps:
            with _lost_for_good():
                reply = decode(channel.wait(STEP_DEADLINE_S).header, StepReply)
            lost.update(reply.lost)
            wrong.update(reply.wrong)
        return StepReply(lost, sorted(wrong))

    def grant(self, loan_id: str, holder: Holder, block_ids: Sequence[int]) -> None:
        self._tell(MessageKind.GRANT, GrantHeader(loan_id, holder, list(block_ids)))

    def transfer(self, loan_id: str, new_loan_id: str, holder: Holder) -> None:
        self._tell(MessageKind.TRANSFER, TransferHeader(loan_id, new_loan_id, holder))

    def revoke(self, loan_id: str) -> list[frozenset[int]]:
        """For each rank, what was stored there under it."""
        replies = self._tell(MessageKind.REVOKE, RevokeHeader(loan_id))
        return [frozenset(decode(reply, Revoked).stored) for reply in replies]

    def counted(self) -> list[Counted]:
        """What each of them has counted since it began."""
        replies = self._tell(MessageKind.COUNTS)
        return [count for reply in replies for count in decode(reply, Counts).counted]

    def stop(self) -> None:
        header = msgspec.msgpack.encode(RevokeHeader(""))
        with self._lock:
            for channel in self._grants:
                with contextlib.suppress(PeerLost):  # it may be gone before its answer is out
                    channel.call(MessageKind.STOP, header, deadline_s=GRANT_DEADLINE_S)
        for channel in (*self._steps, *self._grants):
            channel.close()

    def _tell(self, kind: MessageKind, header: msgspec.Struct | None = None) -> list[bytes]:
        """Their answers, each of them."""
        order = b"" if header is None else msgspec.msgpack.encode(header)
        with self._lock, _lost_for_good():
            return [channel.call(kind, order, deadline_s=GRANT_DEADLINE_S).header for channel in self._grants]


@contextlib.contextmanager
def _lost_for_good() -> Iterator[None]:
    """Other instances are lost and come back; a rank of our own does not."""
    try:
        yield
    except PeerLost as error:
        raise RankLost(error.peer, error.reason) from error


def _connect(run_dir: Path, instance: InstanceId, pool: str, rank: int, secret: bytes) -> Channel:
    hello = Hello(PROTOCOL_VERSION, pool, instance, 0, 0, STEP_BYTES, REPLY_BYTES)
    address = control_address(run_dir, instance, rank)
    return connect(address, hello, peer=f"{instance} rank {rank}", timeout_s=GRANT_DEADLINE_S, secret=secret)
