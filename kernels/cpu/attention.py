"""MicroAttention in C++. A decode step calls with the same indices for every layer: only what differs is set.

A call's argument struct is kept (per thread) together with the tensors that it points to, weakly; it is filled anew
when any other tensor comes. A tensor that a call has seen must not be resized in place.
"""

import ctypes
import math
import threading
from collections.abc import Callable
from weakref import ref

import torch

from .library import DTYPES, KV_DTYPES, Attention, check, check_indices, head_stride, library

Results = tuple[torch.Tensor, torch.Tensor]  # out and lse
Scales = tuple[torch.Tensor, torch.Tensor] | None  # of int8 K and V
# q, pool, block_ids, block_starts, cu_blocks, cu_queries, positions, (scale, causal, window, soft_cap), scales
Inputs = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor,
    tuple[float, bool, int | None, float | None], Scales,
]  # fmt: skip


class _Kept(threading.local):
    """Where full rBlocks are int8, each layer calls once over those and once over the others."""

    call: "AttentionCall | None" = None
    int8_call: "AttentionCall | None" = None


_kept = _Kept()


def _nothing() -> None:
    """A reference to no tensor."""


class AttentionCall:
    """The arguments of calls that differ in queries, layer and outputs only. `attend_again` says which those are."""

    def __init__(self, inputs: Inputs) -> None:
        q_THD, pool_BLK2ND, block_ids_M, block_starts_M, cu_blocks, cu_queries, positions_T, options, scales = inputs
        _check_inputs(inputs)
        self.q_shape, self.q_strides, self.q_dtype = q_THD.shape, q_THD.stride(), q_THD.dtype
        self.pool, self.block_ids, self.block_starts = ref(pool_BLK2ND), ref(block_ids_M), ref(block_starts_M)
        self.cu_blocks, self.cu_queries, self.positions = ref(cu_blocks), ref(cu_queries), ref(positions_T)
        self.scale, self.causal, self.window, self.soft_cap = options
        self.k_scales, self.v_scales = map(ref, scales) if scales else (_nothing, _nothing)
        self.out: Callable[[], torch.Tensor | None] = _nothing
        self.lse: Callable[[], torch.Tensor | None] = _nothing
        self.is_gapped = q_THD.stride(2) != 1
        self.args = _arguments(inputs)
        self.pointer = ctypes.byref(self.args)

    def into(self, out_THD: torch.Tensor, lse_TH: torch.Tensor) -> None:
        """Write there: raises ValueError unless they are fp32, contiguous, of the queries' shape."""
        if out_THD.shape != self.q_shape or lse_TH.shape != self.q_shape[:2]:
            raise ValueError("out must have the queries' shape, lse that of their heads")
        if not all(x.dtype is torch.float32 and x.is_contiguous() and x.is_cpu for x in (out_THD, lse_TH)):
            raise ValueError("out and lse must be contiguous fp32 tensors")
        self.args.out, self.args.lse = out_THD.data_ptr(), lse_TH.data_ptr()
        self.out, self.lse = ref(out_THD), ref(lse_TH)

    def into_new(self) -> Results:
        num_tokens, num_heads, head_dim = self.q_shape
        out_THD = torch.empty(num_tokens, num_heads, head_dim, dtype=torch.float32)
        lse_TH = torch.empty(num_tokens, num_heads, dtype=torch.float32)
        self.args.out, self.args.lse = out_THD.data_ptr(), lse_TH.data_ptr()
        self.out = _nothing
        return out_THD, lse_TH


def attend_again(
    q_THD: torch.Tensor,
    pool_BLK2ND: torch.Tensor,
    layer: int,
    block_ids_M: torch.Tensor,
    block_starts_M: torch.Tensor,
    cu_blocks: torch.Tensor,
    cu_queries: torch.Tensor,
    positions_T: torch.Tensor,
    scale: float,
    causal: bool,
    window: int | None = None,
    soft_cap: float | None = None,
    out: Results | None = None,
    scales: Scales = None,
) -> Results | None:
    """This thread's last call of this kind again, if only queries, layer and outputs differ; None: it is another call.

    What it checks is what could have changed since that call was checked. In one piece: every call costs time here.
    """
    call = _kept.call if scales is None else _kept.int8_call
    if (
        call is None
        or call.positions() is not positions_T
        or call.block_ids() is not block_ids_M
        or call.pool() is not pool_BLK2ND
        or call.block_starts() is not block_starts_M
        or call.cu_blocks() is not cu_blocks
        or call.cu_queries() is not cu_queries
        or call.scale != scale
        or call.causal is not causal
        or call.window != window
        or call.soft_cap != soft_cap
        or call.q_dtype is not q_THD.dtype
        or not q_THD.is_cpu
        or call.q_shape != q_THD.shape
        or call.q_strides != q_THD.stride()
        or (scales is not None and not (call.k_scales() is scales[0] and call.v_scales() is scales[1]))
    ):
        return None
    if out is None:
        out = call.into_new()
    elif call.out() is not out[0] or call.lse() is not out[1]:
        call.into(*out)
    args = call.args
    if call.is_gapped:
        q_THD = q_THD.contiguous()
    args.q, args.layer, args.num_threads = q_THD.data_ptr(), layer, torch.get_num_threads()
    status = library.distkv_micro_attention(call.pointer)
    if status:
        check(status)
    return out


def _check_inputs(inputs: Inputs) -> None:
    q_THD, pool_BLK2ND, block_ids_M, block_starts_M, cu_blocks, cu_queries, positions_T, options, scales = inputs
    tensors = (q_THD, pool_BLK2ND, block_ids_M, block_starts_M, cu_blocks, cu_queries, positions_T, *(scales or ()))
    if not all(x.is_cpu for x in tensors):
        raise ValueError("the CPU kernels take tensors on the CPU only")
    if math.isnan(options[0]):
        raise ValueError("the scale is not a number")
    if positions_T.shape[0] != q_THD.shape[0] or block_starts_M.shape[0] != block_ids_M.shape[0]:
        raise ValueError("as many positions as queries and as many starts as rBlocks are needed")
    if pool_BLK2ND.shape[-1] != q_THD.shape[-1]:
        raise ValueError("the pool must have the queries' head size")
    if any(limit is not None and limit <= 0 for limit in options[2:]):
        raise ValueError("a window or a soft cap must be positive")
    if scales is not None:
        _check_scales(pool_BLK2ND, *scales)
    check_indices(block_ids_M, block_starts_M, cu_blocks, cu_queries, positions_T)


def _check_scales(pool_BLK2ND: torch.Tensor, k_scales_BLKD: torch.Tensor, v_scales_BLKN: torch.Tensor) -> None:
    *heads, _, rblock_size, head_dim = pool_BLK2ND.shape
    for scales, width in ((k_scales_BLKD, head_dim), (v_scales_BLKN, rblock_size)):
        if scales.shape != (*heads, width) or scales.dtype is not torch.float32:
            raise ValueError("scales must be fp32 tensors: K's per channel, V's per token, of every rBlock")


def _arguments(inputs: Inputs) -> Attention:
    q_THD, pool_BLK2ND, block_ids_M, block_starts_M, cu_blocks, cu_queries, positions_T, options, scales = inputs
    num_tokens, num_heads, _ = q_THD.shape
    num_blocks, num_layers, kv_heads, _, rblock_size, head_dim = pool_BLK2ND.shape
    scale, causal, window, soft_cap = options
    if q_THD.stride(2) != 1:
        q_THD = q_THD.contiguous()
    return Attention(
        struct_size=ctypes.sizeof(Attention), q_dtype=DTYPES[q_THD.dtype], kv_dtype=KV_DTYPES[pool_BLK2ND.dtype],
        num_heads=num_heads, kv_heads=kv_heads, head_dim=head_dim, rblock_size=rblock_size, num_layers=num_layers,
        causal=causal, scale=scale, soft_cap=soft_cap or 0.0, window=window or 0,
        num_tokens=num_tokens, num_sequences=len(cu_queries) - 1, num_listed=len(block_ids_M), num_blocks=num_blocks,
        q_token_stride=q_THD.stride(0), q_head_stride=q_THD.stride(1), pool=pool_BLK2ND.data_ptr(),
        head_stride=head_stride(pool_BLK2ND),
        block_ids=block_ids_M.data_ptr(), block_starts=block_starts_M.data_ptr(), cu_blocks=cu_blocks.data_ptr(),
        cu_queries=cu_queries.data_ptr(), positions=positions_T.data_ptr(),
        k_scales=scales and scales[0].data_ptr(), v_scales=scales and scales[1].data_ptr(),
        k_scales_stride=head_stride(scales[0]) if scales else 0,
        v_scales_stride=head_stride(scales[1]) if scales else 0,
    )  # fmt: skip


def micro_attention(
    q_THD: torch.Tensor,
    pool_BLK2ND: torch.Tensor,
    layer: int,
    block_ids_M: torch.Tensor,
    block_starts_M: torch.Tensor,
    cu_blocks: torch.Tensor,
    cu_queries: torch.Tensor,
    positions_T: torch.Tensor,
    scale: float,
    causal: bool,
    window: int | None = None,
    soft_cap: float | None = None,
    out: Results | None = None,
    scales: Scales = None,
) -> Results:
    indices = (block_ids_M, block_starts_M, cu_blocks, cu_queries, positions_T)
    options = (scale, causal, window, soft_cap)
    done = attend_again(q_THD, pool_BLK2ND, layer, *indices, *options, out, scales)
    if done is not None:
        return done
    call = AttentionCall((q_THD, pool_BLK2ND, *indices, options, scales))
    if scales is None:
        _kept.call = call
    else:
        _kept.int8_call = call
    done = attend_again(q_THD, pool_BLK2ND, layer, *indices, *options, out, scales)
    assert done is not None
    return done
