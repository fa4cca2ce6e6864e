"""Channels to other members, and what travels or is measured over them: what needs sockets and tensors for it."""

from megatron_distkv.peers.control_channels import ControlChannels
from megatron_distkv.peers.link_probe import LinkProbe
from megatron_distkv.peers.migration import Migration
from megatron_distkv.peers.peers import MailboxSizes, Peers

__all__ = ["ControlChannels", "LinkProbe", "MailboxSizes", "Migration", "Peers"]
