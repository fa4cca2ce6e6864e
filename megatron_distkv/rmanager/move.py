"""One move of KV: which of this instance's rBlocks go to which rBlocks of a creditor. Part of a step's plan."""

import msgspec


class Move(msgspec.Struct, frozen=True):
    """Copy local rBlocks `local_ids` to `remote_ids` at `creditor`, before the step writes anything."""

    request_id: str
    creditor: str
    address: str
    loan_id: str
    local_ids: list[int]
    remote_ids: list[int]
