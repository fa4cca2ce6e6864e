"""The same functions as `reference`, in C++ for CPUs: contract and shape legend there and in megatron_distkv/ops.

Tensors lie on the CPU; K, V, pools and queries are fp32, bf16 or fp16. Raises IndexError for an id outside its pool.
"""

import ctypes

import torch

from .attention import attend_again as attend_again
from .attention import micro_attention as micro_attention
from .library import DTYPES, Rope, Store, check, check_indices, library
from .linear import linear as linear
from .linear import most_linear_rows as most_linear_rows
from .packing import pack_into as pack_into
from .sampling import sample as sample


def is_built() -> bool:
    return library is not None


def instruction_set() -> str:
    """Which of the compiled variants this machine runs."""
    assert library is not None
    return str(library.distkv_isa().decode())


def use_instruction_set(name: str) -> bool:
    """For tests and measurements; False where this machine or build lacks it."""
    assert library is not None
    return bool(library.distkv_use_isa(name.encode()))


def can_serve(*tensors: torch.Tensor) -> bool:
    """Whether these may be given to the functions below."""
    for tensor in tensors:  # noqa: SIM110 (a generator costs half a microsecond, and this stands before every call)
        if tensor.dtype not in DTYPES or not tensor.is_cpu:
            return False
    return True


def merge(
    outs_PTHD: torch.Tensor, lses_PTH: torch.Tensor, out: tuple[torch.Tensor, torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    outs_PTHD, lses_PTH = outs_PTHD.contiguous(), lses_PTH.contiguous()
    num_parts, num_tokens, num_heads, head_dim = outs_PTHD.shape
    out_THD, lse_TH = out or (outs_PTHD.new_empty(outs_PTHD.shape[1:]), lses_PTH.new_empty(lses_PTH.shape[1:]))
    status = library.distkv_merge(
        outs_PTHD.data_ptr(),
        lses_PTH.data_ptr(),
        num_parts,
        num_tokens * num_heads,
        head_dim,
        out_THD.data_ptr(),
        lse_TH.data_ptr(),
        torch.get_num_threads(),
    )
    check(status)
    return out_THD, lse_TH


def store_kv(
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    pool_BLK2ND: torch.Tensor,
    layer: int,
    slot_mapping_T: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    k_TKD, v_TKD = (x if x.stride(2) == 1 else x.contiguous() for x in (k_TKD, v_TKD))
    num_blocks, num_layers, kv_heads, _, rblock_size, head_dim = pool_BLK2ND.shape
    if not k_TKD.shape == v_TKD.shape == (slot_mapping_T.shape[0], kv_heads, head_dim) or k_TKD.dtype != v_TKD.dtype:
        raise ValueError("K and V must be of one dtype and shape: a row per slot, the pool's heads and head size")
    if not pool_BLK2ND.is_contiguous():
        raise ValueError("the pool must be contiguous")
    check_indices(slot_mapping_T)
    cos_TR, sin_TR = (x.contiguous() for x in angles) if angles else (None, None)
    args = Store(
        ctypes.sizeof(Store),
        torch.get_num_threads(),
        DTYPES[k_TKD.dtype],
        DTYPES[pool_BLK2ND.dtype],
        kv_heads,
        head_dim,
        rblock_size,
        layer,
        num_layers,
        0 if cos_TR is None else cos_TR.shape[1],
        k_TKD.shape[0],
        num_blocks,
        k_TKD.data_ptr(),
        v_TKD.data_ptr(),
        k_TKD.stride(0),
        k_TKD.stride(1),
        v_TKD.stride(0),
        v_TKD.stride(1),
        None if cos_TR is None else cos_TR.data_ptr(),
        None if sin_TR is None else sin_TR.data_ptr(),
        pool_BLK2ND.data_ptr(),
        slot_mapping_T.data_ptr(),
    )
    check(library.distkv_store_kv(ctypes.byref(args)))


def apply_rope(x_THD: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor) -> torch.Tensor:
    if x_THD.stride(2) != 1:
        x_THD = x_THD.contiguous()
    cos_TR, sin_TR = cos_TR.contiguous(), sin_TR.contiguous()
    num_tokens, num_heads, head_dim = x_THD.shape
    out_THD = torch.empty(x_THD.shape, dtype=x_THD.dtype)
    args = Rope(
        ctypes.sizeof(Rope),
        torch.get_num_threads(),
        DTYPES[x_THD.dtype],
        num_heads,
        head_dim,
        cos_TR.shape[-1],
        num_tokens,
        x_THD.stride(0),
        x_THD.stride(1),
        x_THD.data_ptr(),
        cos_TR.data_ptr(),
        sin_TR.data_ptr(),
        out_THD.data_ptr(),
    )
    check(library.distkv_apply_rope(ctypes.byref(args)))
    return out_THD


def gather_rblocks(pool_BLK2ND: torch.Tensor, block_ids: torch.Tensor) -> torch.Tensor:
    check_indices(block_ids)
    data_MLK2ND = pool_BLK2ND.new_empty((block_ids.shape[0], *pool_BLK2ND.shape[1:]))
    status = library.distkv_gather(
        pool_BLK2ND.data_ptr(),
        pool_BLK2ND.shape[0],
        _rblock_bytes(pool_BLK2ND),
        block_ids.data_ptr(),
        block_ids.shape[0],
        data_MLK2ND.data_ptr(),
        torch.get_num_threads(),
    )
    check(status)
    return data_MLK2ND


def scatter_rblocks(data_MLK2ND: torch.Tensor, pool_BLK2ND: torch.Tensor, block_ids: torch.Tensor) -> None:
    if data_MLK2ND.dtype != pool_BLK2ND.dtype or data_MLK2ND.shape != (len(block_ids), *pool_BLK2ND.shape[1:]):
        raise ValueError("the rBlocks are not of the pool's dtype and shape, one per id")
    check_indices(block_ids)
    data_MLK2ND = data_MLK2ND.contiguous()
    status = library.distkv_scatter(
        data_MLK2ND.data_ptr(),
        pool_BLK2ND.data_ptr(),
        pool_BLK2ND.shape[0],
        _rblock_bytes(pool_BLK2ND),
        block_ids.data_ptr(),
        block_ids.shape[0],
        torch.get_num_threads(),
    )
    check(status)


def _rblock_bytes(pool_BLK2ND: torch.Tensor) -> int:
    return pool_BLK2ND[0].numel() * pool_BLK2ND.element_size()
