"""DistAttention: attention over rBlocks computed where they lie, merged exactly by log-sum-exp."""

from megatron_distkv.attention.creditor import Creditor
from megatron_distkv.attention.debtor import Debtor
from megatron_distkv.attention.dist_attention import DistAttention
from megatron_distkv.attention.forward_context import ForwardContext, forward_context
from megatron_distkv.attention.loan_table import LoanTable
from megatron_distkv.attention.metadata import AttentionMetadata, RemoteShare, SequenceSlice, build_metadata
from megatron_distkv.attention.partial import Partial, merge_partials
from megatron_distkv.attention.rotary import RotaryConfig
from megatron_distkv.attention.verification import Verification

__all__ = [
    "AttentionMetadata",
    "Creditor",
    "Debtor",
    "DistAttention",
    "ForwardContext",
    "LoanTable",
    "Partial",
    "RemoteShare",
    "RotaryConfig",
    "SequenceSlice",
    "Verification",
    "build_metadata",
    "forward_context",
    "merge_partials",
]
