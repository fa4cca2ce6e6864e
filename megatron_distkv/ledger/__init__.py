"""The debt ledger: who lent how many rBlocks to whom. The only room that talks to Redis.

Not from here, but from `opening` and `url`, composition roots get what needs the client of Redis.
"""

from megatron_distkv.ledger.debt_ledger import DebtLedger
from megatron_distkv.ledger.history import render_history
from megatron_distkv.ledger.memory_ledger import MemoryLedger
from megatron_distkv.ledger.pool_snapshot import MemberChange, PoolChanges, PoolReader, PoolSnapshot
from megatron_distkv.ledger.records import (
    CreditorOffer,
    HeartbeatReply,
    InstanceRecord,
    InstanceReport,
    InstanceState,
    Loan,
    LoanState,
    MemberCounts,
    MoveOrder,
    Recall,
    Registration,
    RequestPlacementEntry,
)

__all__ = [
    "CreditorOffer",
    "DebtLedger",
    "HeartbeatReply",
    "InstanceRecord",
    "InstanceReport",
    "InstanceState",
    "Loan",
    "LoanState",
    "MemberChange",
    "MemberCounts",
    "MemoryLedger",
    "MoveOrder",
    "PoolChanges",
    "PoolReader",
    "PoolSnapshot",
    "Recall",
    "Registration",
    "RequestPlacementEntry",
    "render_history",
]
