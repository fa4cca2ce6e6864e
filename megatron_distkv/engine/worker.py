"""A follower: a tensor-parallel rank that does what its leader says, and answers other instances' same ranks."""

import queue
import threading

import msgspec
import torch.distributed as dist

from megatron_distkv.engine.addresses import control_address, rank_address
from megatron_distkv.engine.batch import StepPlan, StepReply
from megatron_distkv.engine.instance_secret import share_instance_secret
from megatron_distkv.engine.listeners import Listeners
from megatron_distkv.engine.plan_stream import PlanReceiver
from megatron_distkv.engine.rank import Rank
from megatron_distkv.errors import DistkvError
from megatron_distkv.log import get_logger
from megatron_distkv.messages import (
    Acknowledge,
    Counts,
    GrantHeader,
    MessageKind,
    Revoked,
    RevokeHeader,
    TransferHeader,
    decode,
    happened_here,
)
from megatron_distkv.transport import Answer, ChannelRequest, Hello, Listener

logger = get_logger(__name__)
_DONE = msgspec.msgpack.encode(Acknowledge())


class Worker:
    """Channel threads take messages; the main thread runs the steps, because collectives belong to one thread."""

    def __init__(self, rank: Rank) -> None:
        self._rank = rank
        self._stream = PlanReceiver()
        self._plans: queue.SimpleQueue[StepPlan | BaseException | None] = queue.SimpleQueue()
        self._replies: queue.SimpleQueue[StepReply] = queue.SimpleQueue()
        self._has_ended = threading.Event()
        config = rank.config
        self._listeners = Listeners(
            config.network,
            rank_address(config.run_dir, config.instance_id, rank.parallel.rank),
            rank.parallel.rank,
            config.ledger.pool,
            self._answer,
            secret=rank.secret,
            on_disconnect=rank.creditor.forget,
            on_fatal=self._plans.put,
        )
        self._control = Listener(
            control_address(config.run_dir, config.instance_id, rank.parallel.rank),
            config.ledger.pool,
            self._obey,
            secret=share_instance_secret(),
            on_disconnect=self._on_leader_gone,
            on_fatal=self._plans.put,
        )
        dist.barrier()  # the leader connects after this

    def run(self) -> None:
        """Until the leader says stop, or is gone; raises what a channel's thread could not go on with."""
        try:
            while (plan := self._plans.get()) is not None:
                if isinstance(plan, BaseException):
                    raise plan
                result = self._rank.runner.run(plan)
                self._replies.put(StepReply(result.lost, sorted(result.wrong)))
        finally:
            self._has_ended.set()
            self._listeners.close()
            self._control.close()
            self._rank.peers.close()

    def _answer(self, hello: Hello, request: ChannelRequest) -> Answer:
        kind = MessageKind(request.kind)
        if kind is MessageKind.QUERY:
            return self._rank.creditor.query(hello, request)
        if kind is MessageKind.STORE:
            return self._rank.creditor.store(hello, request)
        if kind is MessageKind.FETCH:
            return self._rank.creditor.fetch(hello, request)
        raise DistkvError(f"a follower takes no {kind.name} from {hello.instance_id}")

    def _obey(self, _: Hello, request: ChannelRequest) -> Answer:
        """The leader's orders: they come over the control channel only, from who knows this instance's secret."""
        kind = MessageKind(request.kind)
        if kind is MessageKind.STEP:
            self._plans.put(self._stream.decode(request.header))
            return Answer(msgspec.msgpack.encode(self._replies.get()))
        if kind is MessageKind.GRANT:
            grant = decode(request.header, GrantHeader)
            self._rank.loan_table.grant(grant.loan_id, grant.holder, grant.block_ids)
        elif kind is MessageKind.TRANSFER:
            transfer = decode(request.header, TransferHeader)
            self._rank.loan_table.transfer(transfer.loan_id, transfer.new_loan_id, transfer.holder)
        elif kind is MessageKind.REVOKE:
            stored = self._rank.loan_table.revoke(decode(request.header, RevokeHeader).loan_id)
            return Answer(msgspec.msgpack.encode(Revoked(sorted(stored))))
        elif kind is MessageKind.COUNTS:
            return Answer(msgspec.msgpack.encode(Counts(list(happened_here(self._rank.parallel.rank)))))
        elif kind is MessageKind.STOP:
            self._plans.put(None)
        else:
            raise DistkvError(f"{kind.name} is no order")
        return Answer(_DONE)

    def _on_leader_gone(self, _: Hello) -> None:
        if not self._has_ended.is_set():
            logger.warning("the leader is gone")
            self._plans.put(None)
