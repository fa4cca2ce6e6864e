"""What an instance that leaves asks of its successor, over the channel that it also borrows over."""

from typing import Any

import msgspec

from megatron_distkv.errors import DistkvError
from megatron_distkv.ledger import InstanceRecord
from megatron_distkv.log import get_logger
from megatron_distkv.messages import (
    Acknowledge,
    AdoptHeader,
    LendReply,
    MessageKind,
    PrepareHeader,
    ReleaseHeader,
    decode,
)
from megatron_distkv.rblock import new_loan_id
from megatron_distkv.rmanager.identity import Identity
from megatron_distkv.rmanager.peers import Peers

logger = get_logger(__name__)
_ADOPTION = 0  # the number of a loan that is none; ids of adoptions are as hard to guess


def new_adoption_id(identity: Identity) -> str:
    return new_loan_id(identity.instance, identity.epoch, _ADOPTION)


class SuccessorDesk:
    """Never raises for a successor that is gone or says no. Only the engine's thread calls it."""

    def __init__(self, peers: Peers, identity: Identity, deadline_s: float) -> None:
        self._peers = peers
        self._identity = identity
        self._deadline_s = deadline_s

    def shuns(self, instance: str) -> bool:
        return self._peers.shuns(instance)

    def prepare(self, successor: InstanceRecord, adoption_id: str, num_rblocks: int) -> list[int]:
        """Physical ids of `num_rblocks` rBlocks that it keeps for this; none: it has no room, or is gone."""
        reply = self._call(successor, MessageKind.PREPARE, PrepareHeader(adoption_id, num_rblocks), LendReply)
        if reply is None or reply.refusal is not None or len(set(reply.block_ids)) != num_rblocks:
            return []
        return list(reply.block_ids)

    def hand_over(self, successor: InstanceRecord, header: AdoptHeader) -> bool:
        reply = self._call(successor, MessageKind.ADOPT, header, Acknowledge)
        return reply is not None and reply.refusal is None

    def give_up(self, successor: InstanceRecord, adoption_id: str) -> None:
        """It keeps nothing for this any more; one that cannot hear it stops by itself after a while."""
        self._call(successor, MessageKind.RELEASE, ReleaseHeader(adoption_id, self._identity.instance), Acknowledge)

    def _call(self, successor: InstanceRecord, kind: MessageKind, header: msgspec.Struct, answer: type[Any]) -> Any:
        try:
            channel = self._peers.reach(successor.instance, successor.address)
            reply = channel.call(kind, msgspec.msgpack.encode(header), deadline_s=self._deadline_s)
            return decode(reply.header, answer)
        except DistkvError as error:
            logger.warning("no handover to %s: %s", successor.instance, error)
            return None
