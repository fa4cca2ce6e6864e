"""What an instance that leaves asks of its successors: each question a job, its answer found in a later step."""

from concurrent.futures import Executor, Future
from contextlib import suppress
from typing import Any, TypeVar

import msgspec

from megatron_distkv.clock import Clock
from megatron_distkv.errors import DistkvError
from megatron_distkv.log import get_logger
from megatron_distkv.messages import (
    Acknowledge,
    CommitHeader,
    LendReply,
    MessageKind,
    PrepareHeader,
    Refusal,
    ReleaseHeader,
)
from megatron_distkv.pool import COOLDOWN_S, Control, Identity, Member, Quarantine
from megatron_distkv.rblock import new_loan_id

logger = get_logger(__name__)
_HANDOVER = 0  # the number of a loan that is none; ids of handovers are as hard to guess
# One that has refused is asked again after this: its heartbeats, and so the picture of it, are newer by then.
REFUSED_S = 0.5
_Reply = TypeVar("_Reply")


def new_handover_id(identity: Identity) -> str:
    return new_loan_id(identity.instance, identity.epoch, _HANDOVER)


class HandoverClient:
    """The engine's thread posts; no job raises for a successor that is gone or says no.

    `lost`: members whose channels were lost a short while ago.
    """

    def __init__(self, control: Control, lost: Quarantine, identity: Identity, jobs: Executor, clock: Clock) -> None:
        self._control = control
        self._lost = lost
        self._identity = identity
        self._jobs = jobs
        self._clock = clock
        self._silent = Quarantine(clock)
        self._refused_at_s: dict[str, float] = {}

    def has_lost(self, instance: str) -> bool:
        return self._lost.holds(instance)

    def may_ask(self, instance: str) -> bool:
        is_recent = self._clock.monotonic_s() < self.refused_at_s(instance) + REFUSED_S
        return not (is_recent or self._lost.holds(instance) or self._silent.holds(instance))

    def refused_at_s(self, instance: str) -> float:
        """When it refused last; who has not since it last agreed, is asked before who has."""
        return self._refused_at_s.get(instance, float("-inf"))

    # ------------------------------------------------------------------ questions

    def prepare(self, successor: Member, handover_id: str, num_rblocks: int) -> "Future[LendReply]":
        """Physical ids of `num_rblocks` rBlocks in all that it keeps for this, or why not."""
        return self._jobs.submit(self._prepare, successor, PrepareHeader(handover_id, num_rblocks))

    def commit(self, successor: Member, header: CommitHeader) -> "Future[bool]":
        """The request is the successor's from now on; False: it does not take it, or is gone."""
        return self._jobs.submit(self._commit, successor, header)

    def give_up(self, successor: Member, handover_id: str, after: "Future[Any] | None") -> None:
        """It keeps nothing for this any more, and hears so after the question that is under way.

        One that cannot hear it stops by itself after a while.
        """
        header = ReleaseHeader(handover_id, self._identity.instance)

        def tell(question: "Future[Any] | None" = None) -> None:
            if question is None or not question.cancelled():
                with suppress(RuntimeError):  # this instance has ended
                    self._jobs.submit(self._ask, successor, MessageKind.RELEASE, header, Acknowledge)

        if after is None:
            tell()
        else:
            after.add_done_callback(tell)

    # ------------------------------------------------------------------ jobs

    def _prepare(self, successor: Member, header: PrepareHeader) -> LendReply:
        reply = self._ask(successor, MessageKind.PREPARE, header, LendReply)
        if reply is None:
            return LendReply(refusal=Refusal.STALE_CREDITOR)
        if reply.refusal is None and len(set(reply.block_ids)) != header.num_rblocks:
            logger.warning("%s gave %d rBlocks for %d", successor.instance, len(reply.block_ids), header.num_rblocks)
            reply = LendReply(refusal=Refusal.CONFLICT)
        self._note(successor, reply.refusal)
        return reply

    def _commit(self, successor: Member, header: CommitHeader) -> bool:
        reply = self._ask(successor, MessageKind.COMMIT, header, Acknowledge)
        if reply is not None:
            self._note(successor, reply.refusal)
        return reply is not None and reply.refusal is None

    def _note(self, successor: Member, refusal: Refusal | None) -> None:
        if refusal is None:
            self._silent.forgive(successor.instance)
            self._refused_at_s.pop(successor.instance, None)
        else:
            self._refused_at_s[successor.instance] = self._clock.monotonic_s()

    def _ask(self, successor: Member, kind: MessageKind, header: msgspec.Struct, answer: type[_Reply]) -> _Reply | None:
        """None: it cannot answer, and is left alone for longer each time."""
        try:
            return self._control.ask(successor.peer, kind, header, answer)
        except DistkvError as error:
            logger.warning("no handover to %s: %s", successor.instance, error)
            self._silent.put_for_failing(successor.instance, COOLDOWN_S)
            return None
