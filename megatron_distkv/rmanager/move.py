"""Moves of KV between this instance's rBlocks and those of a creditor. Part of a step's plan."""

import msgspec

from megatron_distkv.pool import Peer


class Move(msgspec.Struct, frozen=True):
    """Copy local rBlocks `local_ids` to `remote_ids` at `peer`, before any is written."""

    request_id: str
    peer: Peer
    loan_id: str
    local_ids: list[int]
    remote_ids: list[int]
    from_host: bool = False  # the local ids are of own host memory

    @property
    def creditor(self) -> str:
        return self.peer.instance


class Pull(msgspec.Struct, frozen=True):
    """Copy `remote_ids` at `peer` to local rBlocks `local_ids`: after all moves, before any is written."""

    request_id: str
    peer: Peer
    loan_id: str
    remote_ids: list[int]
    local_ids: list[int]

    @property
    def creditor(self) -> str:
        return self.peer.instance
