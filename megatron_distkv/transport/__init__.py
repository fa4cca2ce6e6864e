"""Tensors between two processes: over shared memory on one host, else over TCP, TLS or NIXL.

Every wait has a deadline.
"""

from megatron_distkv.transport.channel import Channel, Reply, connect
from megatron_distkv.transport.hello import PROTOCOL_VERSION, Hello
from megatron_distkv.transport.listener import Answer, ChannelRequest, Handler, Listener, OnFatal
from megatron_distkv.transport.mailbox import pack_tensors
from megatron_distkv.transport.pool_secret import OPEN_POOL, read_secret, write_new_secret
from megatron_distkv.transport.socket_file import SocketFile
from megatron_distkv.transport.tensors import TensorSpec, read_tensors
from megatron_distkv.transport.tls import Tls, load_tls

__all__ = [
    "OPEN_POOL",
    "PROTOCOL_VERSION",
    "Answer",
    "Channel",
    "ChannelRequest",
    "Handler",
    "Hello",
    "Listener",
    "OnFatal",
    "Reply",
    "SocketFile",
    "TensorSpec",
    "Tls",
    "connect",
    "load_tls",
    "pack_tensors",
    "read_secret",
    "read_tensors",
    "write_new_secret",
]
