"""Who holds this instance's rBlocks: lending, migration, and the one API over local and borrowed memory."""

from megatron_distkv.rmanager.adoptions import Adoption, Adoptions, adopted_table
from megatron_distkv.rmanager.control_channels import ControlChannels
from megatron_distkv.rmanager.lending import Followers, Lending, NoFollowers
from megatron_distkv.rmanager.link_probe import LinkProbe
from megatron_distkv.rmanager.migration import Migration
from megatron_distkv.rmanager.move import Move
from megatron_distkv.rmanager.peers import MailboxSizes, Peers
from megatron_distkv.rmanager.rmanager import RManager
from megatron_distkv.rmanager.successor_desk import SuccessorDesk, new_adoption_id

__all__ = [
    "Adoption",
    "Adoptions",
    "ControlChannels",
    "Followers",
    "Lending",
    "LinkProbe",
    "MailboxSizes",
    "Migration",
    "Move",
    "NoFollowers",
    "Peers",
    "RManager",
    "SuccessorDesk",
    "adopted_table",
    "new_adoption_id",
]
