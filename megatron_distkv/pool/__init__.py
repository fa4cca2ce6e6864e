"""What this process knows of the pool: members, their loans, and what they could lend. The way to the ledger.

Engine, rManager and server reach the ledger through this room only: its records are named here, too.
"""

from megatron_distkv.ledger import (
    CreditorOffer,
    DebtLedger,
    InstanceReport,
    InstanceState,
    MoveOrder,
    RequestPlacementEntry,
)
from megatron_distkv.pool.audit import check_instance, check_picture
from megatron_distkv.pool.candidates import Candidates
from megatron_distkv.pool.capacity import PoolCapacity
from megatron_distkv.pool.ended_loans import EndedLoans
from megatron_distkv.pool.links import LinkCost, Links, link_cost
from megatron_distkv.pool.loan_book import LoanBook
from megatron_distkv.pool.loans import COOLDOWN_S, Control, HeldLoan, Loans, RequestOwner
from megatron_distkv.pool.member import (
    Identity,
    Member,
    MemberInfo,
    MemberUnreadable,
    Peer,
    read_info,
    read_member,
    write_info,
)
from megatron_distkv.pool.membership import Membership, PoolTotals
from megatron_distkv.pool.picture import Picture, picture_of
from megatron_distkv.pool.quarantine import Quarantine
from megatron_distkv.pool.report import render_debts
from megatron_distkv.pool.view import PoolView

__all__ = [
    "COOLDOWN_S",
    "Candidates",
    "Control",
    "CreditorOffer",
    "DebtLedger",
    "EndedLoans",
    "HeldLoan",
    "Identity",
    "InstanceReport",
    "InstanceState",
    "LinkCost",
    "Links",
    "LoanBook",
    "Loans",
    "Member",
    "MemberInfo",
    "MemberUnreadable",
    "Membership",
    "MoveOrder",
    "Peer",
    "Picture",
    "PoolCapacity",
    "PoolTotals",
    "PoolView",
    "Quarantine",
    "RequestOwner",
    "RequestPlacementEntry",
    "check_instance",
    "check_picture",
    "link_cost",
    "picture_of",
    "read_info",
    "read_member",
    "render_debts",
    "write_info",
]
