"""Who holds this instance's rBlocks: borrowing, lending, migration, and the one API over local and borrowed memory."""

from megatron_distkv.rmanager.adoptions import Adoption, Adoptions, adopted_table
from megatron_distkv.rmanager.borrowing import Borrowing
from megatron_distkv.rmanager.heartbeat import Heartbeat
from megatron_distkv.rmanager.identity import Identity
from megatron_distkv.rmanager.late_releases import LateReleases
from megatron_distkv.rmanager.lending import Followers, Lending, NoFollowers
from megatron_distkv.rmanager.migration import Migration
from megatron_distkv.rmanager.move import Move
from megatron_distkv.rmanager.peers import MailboxSizes, Peers
from megatron_distkv.rmanager.pool_outlook import PoolOutlook
from megatron_distkv.rmanager.rmanager import RManager
from megatron_distkv.rmanager.successor_desk import SuccessorDesk, new_adoption_id
from megatron_distkv.rmanager.ways import Ways

__all__ = [
    "Adoption",
    "Adoptions",
    "Borrowing",
    "Followers",
    "Heartbeat",
    "Identity",
    "LateReleases",
    "Lending",
    "MailboxSizes",
    "Migration",
    "Move",
    "NoFollowers",
    "Peers",
    "PoolOutlook",
    "RManager",
    "SuccessorDesk",
    "Ways",
    "adopted_table",
    "new_adoption_id",
]
