"""Tensors between two processes: one doorbell and one mailbox per pair. Every wait has a deadline."""

from megatron_distkv.transport.channel import Channel, Reply, connect
from megatron_distkv.transport.hello import PROTOCOL_VERSION, Hello
from megatron_distkv.transport.listener import Answer, Handler, Listener, Request
from megatron_distkv.transport.pool_secret import OPEN_POOL, read_secret, write_new_secret
from megatron_distkv.transport.tensors import TensorSpec, read_tensors

__all__ = [
    "OPEN_POOL",
    "PROTOCOL_VERSION",
    "Answer",
    "Channel",
    "Handler",
    "Hello",
    "Listener",
    "Reply",
    "Request",
    "TensorSpec",
    "connect",
    "read_secret",
    "read_tensors",
    "write_new_secret",
]
