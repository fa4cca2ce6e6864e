"""Moves of KV between this instance's rBlocks and those of a creditor. Part of a step's plan."""

import msgspec


class Move(msgspec.Struct, frozen=True):
    """Copy local rBlocks `local_ids` to `remote_ids` at `creditor`, before any is written."""

    request_id: str
    creditor: str
    address: str
    loan_id: str
    local_ids: list[int]
    remote_ids: list[int]
    from_host: bool = False  # the local ids are of own host memory


class Pull(msgspec.Struct, frozen=True):
    """Copy `remote_ids` at `creditor` to local rBlocks `local_ids`: after all moves, before any is written."""

    request_id: str
    creditor: str
    address: str
    loan_id: str
    remote_ids: list[int]
    local_ids: list[int]
