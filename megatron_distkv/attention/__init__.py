"""DistAttention: attention over rBlocks computed where they lie, merged exactly by log-sum-exp."""

from megatron_distkv.attention.creditor import Creditor, asker_of
from megatron_distkv.attention.creditor_channel import CreditorChannel
from megatron_distkv.attention.deadlines import Deadlines
from megatron_distkv.attention.debtor import Debtor
from megatron_distkv.attention.dense_attention import DenseAttention
from megatron_distkv.attention.dist_attention import DistAttention
from megatron_distkv.attention.fixed_order.fixed_attention import FixedAttention
from megatron_distkv.attention.forward_context import ForwardContext, forward_context
from megatron_distkv.attention.head_share import HeadShare
from megatron_distkv.attention.host_memory import HostMemory
from megatron_distkv.attention.loan_table import Access, LoanTable
from megatron_distkv.attention.metadata import AttentionMetadata, RemoteShare, SequenceSlice, build_metadata
from megatron_distkv.attention.open_index import OpenSlice
from megatron_distkv.attention.open_rblocks import NewKeys, OpenRBlocks
from megatron_distkv.attention.partial import Merges, Partial
from megatron_distkv.attention.query_limiter import QueryLimiter
from megatron_distkv.attention.rotary import RotaryConfig
from megatron_distkv.attention.sequence_attention import SequenceAttention
from megatron_distkv.attention.span_tensors import KeptSpans
from megatron_distkv.attention.split_channel import Part, SplitChannel
from megatron_distkv.attention.verification import Verification

__all__ = [
    "Access",
    "AttentionMetadata",
    "Creditor",
    "CreditorChannel",
    "Deadlines",
    "Debtor",
    "DenseAttention",
    "DistAttention",
    "FixedAttention",
    "ForwardContext",
    "HeadShare",
    "HostMemory",
    "KeptSpans",
    "LoanTable",
    "Merges",
    "NewKeys",
    "OpenRBlocks",
    "OpenSlice",
    "Part",
    "Partial",
    "QueryLimiter",
    "RemoteShare",
    "RotaryConfig",
    "SequenceAttention",
    "SequenceSlice",
    "SplitChannel",
    "Verification",
    "asker_of",
    "build_metadata",
    "forward_context",
]
