"""The debt ledger: who lent how many rBlocks to whom. The only room that talks to Redis."""

from megatron_distkv.ledger.books import check_instance, check_snapshot
from megatron_distkv.ledger.debt_ledger import DebtLedger
from megatron_distkv.ledger.history import render_history
from megatron_distkv.ledger.memory_ledger import MemoryLedger
from megatron_distkv.ledger.open_ledger import open_ledger
from megatron_distkv.ledger.pool_snapshot import MemberChange, PoolChanges, PoolReader, PoolSnapshot, render_debts
from megatron_distkv.ledger.records import (
    HOST_QUERY_US,
    HOST_RBLOCKS,
    LENDER,
    QUERY_US,
    ROLE,
    Creditor,
    HeartbeatReply,
    InstanceRecord,
    InstanceReport,
    InstanceState,
    Loan,
    LoanState,
    Move,
    Recall,
    Registration,
    RequestPlacementEntry,
)
from megatron_distkv.ledger.url import shown
from megatron_distkv.ledger.way_costs import WAYS, WayCost, read_ways, write_ways

__all__ = [
    "HOST_QUERY_US",
    "HOST_RBLOCKS",
    "LENDER",
    "QUERY_US",
    "ROLE",
    "WAYS",
    "Creditor",
    "DebtLedger",
    "HeartbeatReply",
    "InstanceRecord",
    "InstanceReport",
    "InstanceState",
    "Loan",
    "LoanState",
    "MemberChange",
    "MemoryLedger",
    "Move",
    "PoolChanges",
    "PoolReader",
    "PoolSnapshot",
    "Recall",
    "Registration",
    "RequestPlacementEntry",
    "WayCost",
    "check_instance",
    "check_snapshot",
    "open_ledger",
    "read_ways",
    "render_debts",
    "render_history",
    "shown",
    "write_ways",
]
