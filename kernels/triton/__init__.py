"""Kernels for GPUs in Triton; under its interpreter (TRITON_INTERPRET=1) they run on tensors of the CPU, for tests.

Host side: checks, launch shapes, allocation. Nothing here reads a tensor's values, so nothing waits for the GPU.
Legend: T query tokens, H query heads, K KV heads, G = H / K, D head dim, B rBlocks, L layers, N tokens per rBlock,
M rBlocks listed, P partials, R rotated dims.
"""

from functools import cache

import torch
import triton
from megatron_distkv.kernels.triton.attention import attention_kernel
from megatron_distkv.kernels.triton.backward import key_gradients_kernel, query_gradients_kernel
from megatron_distkv.kernels.triton.merge import merge_kernel
from megatron_distkv.kernels.triton.shapes import LaunchShape, attention_shape, backward_shapes, num_splits, power_of_2
from megatron_distkv.kernels.triton.store import rope_kernel, store_kv_kernel

IS_INTERPRETED = triton.knobs.runtime.interpret
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# A merging program reads so many rows of partial results at once, of which at most 16 belong to one merged row.
MERGED_AT_ONCE, MOST_PARTIALS_AT_ONCE = 32, 16


def can_serve(*tensors: torch.Tensor) -> bool:
    where = "cpu" if IS_INTERPRETED else "cuda"
    return all(tensor.device.type == where and tensor.dtype in DTYPES for tensor in tensors)


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
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    k_scales, v_scales = _scales_of_layer(pool_BLK2ND, layer, scales) if scales else (q_THD, q_THD)
    _check(q_THD, pool_BLK2ND, block_ids_M, block_starts_M, cu_blocks, cu_queries, positions_T)
    if not scale > 0:
        raise ValueError(f"a score's maximum is taken before its scale is multiplied in: it must be > 0, not {scale}")
    num_tokens, num_heads, head_dim = q_THD.shape
    kv_heads, size = pool_BLK2ND.shape[2], pool_BLK2ND.shape[4]
    group, num_sequences = num_heads // kv_heads, len(cu_blocks) - 1
    is_exact, num_rows = _is_exact(q_THD, pool_BLK2ND, scales is not None), num_tokens * group
    shape = attention_shape(
        num_rows, num_sequences, _padded(head_dim), size, is_exact and not IS_INTERPRETED,
        is_windowed=window is not None, is_int8=scales is not None,
    )  # fmt: skip
    # Every sequence may end in a tile of its own that is not full.
    num_tiles = num_rows // shape.rows + num_sequences
    splits = num_splits(
        max(num_sequences, triton.cdiv(num_rows, shape.rows)) * kv_heads,
        len(block_ids_M) // max(1, num_sequences),
        _num_multiprocessors(q_THD.device) * shape.per_sm,
    )
    final = _checked_partial(q_THD, *out) if out else _new_partial(q_THD)
    outs, lses = (x[None] for x in final) if splits == 1 else _new_partial(q_THD, splits)
    if num_tokens == 0:
        return final
    pool = pool_BLK2ND[:, layer]
    attention_kernel[(num_tiles, kv_heads, splits)](
        q_THD, pool, block_ids_M, block_starts_M, cu_blocks, cu_queries, positions_T, outs, lses,
        k_scales, v_scales, scale, soft_cap or 0.0, window or 0, num_heads, num_sequences, splits,
        *q_THD.stride()[:2], *pool.stride()[:3], outs.stride(0), lses.stride(0),
        *k_scales.stride()[:2], *v_scales.stride()[:2],
        G=group, N=size, D=head_dim, D_PADDED=_padded(head_dim),
        CAUSAL=causal, WINDOWED=window is not None, CAPPED=soft_cap is not None,
        EXACT=is_exact, INT8=scales is not None, **_options(shape),
    )  # fmt: skip
    return final if splits == 1 else _merge_into(final, outs, lses)


def merge(
    outs_PTHD: torch.Tensor, lses_PTH: torch.Tensor, out: tuple[torch.Tensor, torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    final = out or (outs_PTHD.new_empty(outs_PTHD.shape[1:]), lses_PTH.new_empty(lses_PTH.shape[1:]))
    return _merge_into(final, outs_PTHD.contiguous(), lses_PTH.contiguous())


def _merge_into(
    final: tuple[torch.Tensor, torch.Tensor], outs_PTHD: torch.Tensor, lses_PTH: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = final
    head_dim = out.shape[-1]
    num_partials = power_of_2(len(lses_PTH))
    at_once = min(num_partials, MOST_PARTIALS_AT_ONCE)
    rows = MERGED_AT_ONCE // at_once
    if lse.numel():
        merge_kernel[(triton.cdiv(lse.numel(), rows),)](
            outs_PTHD, lses_PTH, out, lse, len(lses_PTH), lse.numel(), D=head_dim, D_PADDED=power_of_2(head_dim),
            P_PADDED=num_partials, BLOCK_P=at_once, BLOCK_R=rows,
        )  # fmt: skip
    return out, lse


def store_kv(
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    pool_BLK2ND: torch.Tensor,
    layer: int,
    slot_mapping_T: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    num_tokens, kv_heads, head_dim = k_TKD.shape
    if not k_TKD.shape == v_TKD.shape == (len(slot_mapping_T), *pool_BLK2ND.shape[2:3], *pool_BLK2ND.shape[5:]):
        raise ValueError("K and V must be of one shape: a row per slot, the pool's heads and head size")
    if not pool_BLK2ND.is_contiguous() or slot_mapping_T.dtype != torch.int64:
        raise ValueError("the pool must be contiguous, slots int64")
    pool = pool_BLK2ND[:, layer]
    cos_TR, sin_TR = (x.contiguous() for x in angles) if angles else (k_TKD, k_TKD)
    if num_tokens:
        store_kv_kernel[(num_tokens,)](
            _dense_rows(k_TKD), _dense_rows(v_TKD), pool, slot_mapping_T, cos_TR, sin_TR,
            *k_TKD.stride()[:2], *v_TKD.stride()[:2], *pool.stride()[:3],
            KV_HEADS=kv_heads, HEADS_PADDED=triton.next_power_of_2(kv_heads), N=pool.shape[3],
            R=cos_TR.shape[1] if angles else 0, D=head_dim, D_PADDED=triton.next_power_of_2(head_dim),
        )  # fmt: skip


def apply_rope(x_THD: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor) -> torch.Tensor:
    num_tokens, num_heads, head_dim = x_THD.shape
    out = x_THD.new_empty(x_THD.shape)
    cos_TR, sin_TR = cos_TR.contiguous(), sin_TR.contiguous()
    if num_tokens:
        rope_kernel[(num_tokens,)](
            _dense_rows(x_THD), cos_TR, sin_TR, out, x_THD.stride(0), x_THD.stride(1),
            H=num_heads, H_PADDED=triton.next_power_of_2(num_heads), R=cos_TR.shape[1],
            D=head_dim, D_PADDED=triton.next_power_of_2(head_dim),
        )  # fmt: skip
    return out


def tile_backward(
    d_out_SBHD: torch.Tensor,
    q_SBHD: torch.Tensor,
    k_XBKD: torch.Tensor,
    v_XBKD: torch.Tensor,
    out_SBHD: torch.Tensor,
    lse_SBH: torch.Tensor,
    scale: float,
    is_causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    inputs = [_dense_rows(x) for x in (q_SBHD, k_XBKD, v_XBKD, d_out_SBHD)]
    num_queries, num_sequences, num_heads, head_dim = q_SBHD.shape
    num_keys, _, kv_heads, _ = k_XBKD.shape
    delta = (d_out_SBHD.float() * out_SBHD.float()).sum(-1)
    d_q, d_k, d_v = (torch.empty(x.shape, dtype=torch.float32, device=x.device) for x in (q_SBHD, k_XBKD, v_XBKD))
    strides = [stride for x in inputs for stride in x.stride()[:3]]
    is_exact = _is_exact(q_SBHD, k_XBKD)
    constants = {"H": num_heads, "G": num_heads // kv_heads, "D": head_dim, "D_PADDED": _padded(head_dim)}
    constants |= {"CAUSAL": is_causal, "EXACT": is_exact}
    of_keys, of_queries = backward_shapes(_padded(head_dim), is_exact and not IS_INTERPRETED)
    given = (*inputs, lse_SBH.contiguous(), delta)
    sizes = (scale, num_queries, num_keys, *strides)
    key_gradients_kernel[(triton.cdiv(num_keys, of_keys.keys), kv_heads, num_sequences)](
        *given, d_k, d_v, *sizes, **constants, **_options(of_keys)
    )
    query_gradients_kernel[(triton.cdiv(num_queries, of_queries.rows), num_heads, num_sequences)](
        *given, d_q, *sizes, **constants, **_options(of_queries)
    )
    return d_q, d_k, d_v


def _options(shape: LaunchShape) -> dict[str, int]:
    sizes = {"BLOCK_M": shape.rows, "BLOCK_N": shape.keys}
    return sizes | {"num_warps": shape.num_warps, "num_stages": shape.num_stages}


def gather_rblocks(pool_BLK2ND: torch.Tensor, block_ids: torch.Tensor) -> torch.Tensor:
    return pool_BLK2ND.index_select(0, block_ids)  # whole rows: torch's copy has nothing to gain


def scatter_rblocks(data_MLK2ND: torch.Tensor, pool_BLK2ND: torch.Tensor, block_ids: torch.Tensor) -> None:
    pool_BLK2ND.index_copy_(0, block_ids, data_MLK2ND)


def _new_partial(q_THD: torch.Tensor, *parts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for out and lse, `parts` times."""
    shapes = (*parts, *q_THD.shape), (*parts, *q_THD.shape[:2])
    out, lse = (torch.empty(shape, dtype=torch.float32, device=q_THD.device) for shape in shapes)
    return out, lse


def _checked_partial(
    q_THD: torch.Tensor, out_THD: torch.Tensor, lse_TH: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A kernel writes wherever it is told to."""
    if out_THD.shape != q_THD.shape or lse_TH.shape != q_THD.shape[:2]:
        raise ValueError("out must have the queries' shape, lse that of their heads")
    if not all(x.dtype == torch.float32 and x.is_contiguous() and x.device == q_THD.device for x in (out_THD, lse_TH)):
        raise ValueError("out and lse must be contiguous fp32 tensors on the queries' device")
    return out_THD, lse_TH


def _check(q_THD: torch.Tensor, pool_BLK2ND: torch.Tensor, *indices: torch.Tensor) -> None:
    if not pool_BLK2ND[0, 0, 0].is_contiguous() or pool_BLK2ND.shape[-1] != q_THD.shape[-1]:
        raise ValueError("the pool's heads must be contiguous and have the queries' head size")
    if q_THD.shape[1] % pool_BLK2ND.shape[2]:
        raise ValueError(f"{q_THD.shape[1]} query heads are no multiple of {pool_BLK2ND.shape[2]} KV heads")
    if any(index.dtype != torch.int64 or not index.is_contiguous() for index in indices):
        raise ValueError("indices must be contiguous int64")
    _dense_rows(q_THD)


def _scales_of_layer(
    pool_BLK2ND: torch.Tensor, layer: int, scales: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    num_rblocks, num_layers, kv_heads, _, size, head_dim = pool_BLK2ND.shape
    shapes = [(num_rblocks, num_layers, kv_heads, extent) for extent in (head_dim, size)]
    if [tuple(x.shape) for x in scales] != shapes:
        raise ValueError(
            f"scales of K and V must be {shapes[0]} and {shapes[1]}, not {[tuple(x.shape) for x in scales]}"
        )
    return _dense_rows(scales[0])[:, layer], _dense_rows(scales[1])[:, layer]


def _dense_rows(x: torch.Tensor) -> torch.Tensor:
    if x.stride(-1) != 1:
        raise ValueError("the head dim must be contiguous")
    return x


@cache
def _num_multiprocessors(device: torch.device) -> int:
    return 2 if IS_INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


def _padded(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


def _is_exact(q_THD: torch.Tensor, pool: torch.Tensor, is_int8: bool = False) -> bool:
    """Rather fp32: heads of so few dims leave the tensor cores idle anyway, and rounded weights would show in them."""
    is_mixed = not is_int8 and q_THD.dtype != pool.dtype
    return IS_INTERPRETED or is_mixed or q_THD.dtype == torch.float32 or q_THD.shape[2] < 32
