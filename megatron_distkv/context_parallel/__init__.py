"""Context parallelism: attention, with autograd, over a sequence that several ranks of a training run share."""

from megatron_distkv.context_parallel.context_shard import ContextShard
from megatron_distkv.context_parallel.ring_attention import RingAttention, ring_attention
from megatron_distkv.context_parallel.zigzag_layout import ZigzagLayout

__all__ = ["ContextShard", "RingAttention", "ZigzagLayout", "ring_attention"]
