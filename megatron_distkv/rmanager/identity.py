"""Who this instance is in the pool: its id, and the epoch under which the ledger knows it now."""

from dataclasses import dataclass

from megatron_distkv.rblock import InstanceId


@dataclass
class Identity:
    """Mutable on purpose: one object shared by all of the rManager, renewed by the heartbeat when the epoch changes."""

    instance: InstanceId
    epoch: int = 0
    generation: str = ""
