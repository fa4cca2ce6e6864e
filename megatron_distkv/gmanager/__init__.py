"""One planner per cluster: sees the whole pool, buries the dead, plans moves. Without it, instances still borrow."""

from megatron_distkv.gmanager.gmanager import GManager

__all__ = ["GManager"]
