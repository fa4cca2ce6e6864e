"""The one global: what the forward pass now running attends to. So metadata never travels through model signatures."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from megatron_distkv.attention.debtor import Debtor
from megatron_distkv.attention.fixed_order.fixed_attention import FixedAttention
from megatron_distkv.attention.metadata import AttentionMetadata
from megatron_distkv.attention.open_rblocks import OpenRBlocks


@dataclass
class ForwardContext:
    metadata: AttentionMetadata
    pool_BLK2ND: torch.Tensor
    debtor: Debtor | None = None  # None: nothing is borrowed
    fixed: FixedAttention | None = None  # attention in fixed order, which asks by itself
    open_rblocks: OpenRBlocks | None = None  # of a pool in int8, which new tokens do not go to at once


_current: ForwardContext | None = None


def current_context() -> ForwardContext | None:
    """None outside of serving: attention is then over whole sequences (training)."""
    return _current


@contextmanager
def forward_context(context: ForwardContext) -> Iterator[ForwardContext]:
    """Run a forward pass over paged KV. Refuses to nest."""
    global _current
    if _current is not None:
        raise RuntimeError("a forward pass is already running in this process")
    _current = context
    try:
        yield context
    finally:
        _current = None
