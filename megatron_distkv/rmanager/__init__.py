"""Who holds this instance's rBlocks: lending, migration, and the one API over local and borrowed memory."""

from megatron_distkv.rmanager.control_channels import ControlChannels
from megatron_distkv.rmanager.lending import Followers, Grants, Lending, NoFollowers
from megatron_distkv.rmanager.link_probe import LinkProbe
from megatron_distkv.rmanager.migration import Migration
from megatron_distkv.rmanager.move import Move
from megatron_distkv.rmanager.peers import MailboxSizes, Peers
from megatron_distkv.rmanager.rmanager import RManager

__all__ = [
    "ControlChannels",
    "Followers",
    "Grants",
    "Lending",
    "LinkProbe",
    "MailboxSizes",
    "Migration",
    "Move",
    "NoFollowers",
    "Peers",
    "RManager",
]
