"""What an instance that leaves asks of its successor, over the channel that it also borrows over."""

from typing import Any

import msgspec

from megatron_distkv.errors import DistkvError
from megatron_distkv.log import get_logger
from megatron_distkv.messages import (
    Acknowledge,
    AdoptHeader,
    LendReply,
    MessageKind,
    PrepareHeader,
    ReleaseHeader,
)
from megatron_distkv.pool import Control, Identity, Member
from megatron_distkv.rblock import new_loan_id
from megatron_distkv.rmanager.peers import Peers

logger = get_logger(__name__)
_ADOPTION = 0  # the number of a loan that is none; ids of adoptions are as hard to guess


def new_adoption_id(identity: Identity) -> str:
    return new_loan_id(identity.instance, identity.epoch, _ADOPTION)


class SuccessorDesk:
    """Never raises for a successor that is gone or says no. Only the engine's thread calls it."""

    def __init__(self, control: Control, peers: Peers, identity: Identity) -> None:
        self._control = control
        self._peers = peers
        self._identity = identity

    def has_lost(self, instance: str) -> bool:
        """A short while ago."""
        return self._peers.lost.holds(instance)

    def prepare(self, successor: Member, adoption_id: str, num_rblocks: int) -> list[int]:
        """Physical ids of `num_rblocks` rBlocks that it keeps for this; none: it has no room, or is gone."""
        reply = self._call(successor, MessageKind.PREPARE, PrepareHeader(adoption_id, num_rblocks), LendReply)
        if reply is None or reply.refusal is not None or len(set(reply.block_ids)) != num_rblocks:
            return []
        return list(reply.block_ids)

    def hand_over(self, successor: Member, header: AdoptHeader) -> bool:
        reply = self._call(successor, MessageKind.ADOPT, header, Acknowledge)
        return reply is not None and reply.refusal is None

    def give_up(self, successor: Member, adoption_id: str) -> None:
        """It keeps nothing for this any more; one that cannot hear it stops by itself after a while."""
        self._call(successor, MessageKind.RELEASE, ReleaseHeader(adoption_id, self._identity.instance), Acknowledge)

    def _call(self, successor: Member, kind: MessageKind, header: msgspec.Struct, answer: type[Any]) -> Any:
        try:
            return self._control.ask(successor.peer, kind, header, answer)
        except DistkvError as error:
            logger.warning("no handover to %s: %s", successor.instance, error)
            return None
