"""Giving running requests away with their KV when an instance leaves, and taking them in."""

from megatron_distkv.handover.client import HandoverClient
from megatron_distkv.handover.drain import Drain
from megatron_distkv.handover.incoming import IncomingHandovers
from megatron_distkv.handover.receiver import Receiver
from megatron_distkv.handover.sender import Sender

__all__ = ["Drain", "HandoverClient", "IncomingHandovers", "Receiver", "Sender"]
