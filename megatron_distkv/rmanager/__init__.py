"""Who holds this instance's rBlocks: lending, moves, and the one API over local and borrowed memory."""

from megatron_distkv.rmanager.lending import Followers, Grants, Lending, NoFollowers
from megatron_distkv.rmanager.move import Move, Pull
from megatron_distkv.rmanager.rmanager import RManager

__all__ = ["Followers", "Grants", "Lending", "Move", "NoFollowers", "Pull", "RManager"]
