"""The only door to kernels/: torch ops with fake kernels, dispatched to the backend in use.

Legend for shape suffixes: T query tokens, H query heads, K KV heads, D head dim, L layers, B rBlocks in the pool,
N tokens per rBlock, M rBlocks listed, P partials, R rotated dims (in sampling: rows of logits).
"""

from megatron_distkv.ops.backend import available_backends, backend_in_use, instruction_set, use_backend
from megatron_distkv.ops.int8_kv import (
    Int8RBlocks,
    micro_attention_int8,
    micro_attention_int8_out,
    pack_rblocks,
    pack_rblocks_into,
    quantize_rblocks,
    readable,
    unpack_rblocks,
)
from megatron_distkv.ops.linear import linear
from megatron_distkv.ops.micro_attention import merge, merge_out, micro_attention, micro_attention_out
from megatron_distkv.ops.move_rblocks import gather_rblocks, scatter_rblocks
from megatron_distkv.ops.sampling import sample_tokens
from megatron_distkv.ops.store_kv import apply_rope, store_kv
from megatron_distkv.ops.tile_backward import tile_backward

__all__ = [
    "Int8RBlocks",
    "apply_rope",
    "available_backends",
    "backend_in_use",
    "gather_rblocks",
    "instruction_set",
    "linear",
    "merge",
    "merge_out",
    "micro_attention",
    "micro_attention_int8",
    "micro_attention_int8_out",
    "micro_attention_out",
    "pack_rblocks",
    "pack_rblocks_into",
    "quantize_rblocks",
    "readable",
    "sample_tokens",
    "scatter_rblocks",
    "store_kv",
    "tile_backward",
    "unpack_rblocks",
    "use_backend",
]
