"""The shared library beside this file, and the structs of its interface (abi.h, field by field)."""

import ctypes
from ctypes import POINTER, Structure, c_char_p, c_float, c_int32, c_int64, c_uint32, c_void_p
from pathlib import Path

import torch

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
KV_DTYPES = {**DTYPES, torch.int8: 3}
PATH = Path(__file__).with_name("libdistkv_cpu.so")

_FAULTS = {
    1: (RuntimeError, "libdistkv_cpu.so is of another build than this package: install again"),
    2: (IndexError, "an rBlock id, slot or offset points outside its tensor"),
    3: (ValueError, "shapes or dtypes that the CPU kernels do not take"),
    4: (MemoryError, "no memory for the CPU kernels' scratch"),
}


def _fields(*groups: tuple[str, type]) -> list[tuple[str, type]]:
    return [(name, kind) for names, kind in groups for name in names.split()]


class Attention(Structure):
    _fields_ = _fields(
        ("struct_size", c_uint32),
        ("num_threads q_dtype kv_dtype num_heads kv_heads head_dim rblock_size layer num_layers causal", c_int32),
        ("scale soft_cap", c_float),
        ("window", c_int64),
        ("num_tokens num_sequences num_listed num_blocks", c_int64),
        ("q", c_void_p),
        ("q_token_stride q_head_stride", c_int64),
        ("pool", c_void_p),
        ("head_stride", c_int64),
        ("k_scales v_scales", c_void_p),
        ("k_scales_stride v_scales_stride", c_int64),
        ("block_ids block_starts cu_blocks cu_queries positions out lse", c_void_p),
    )


class Store(Structure):
    _fields_ = _fields(
        ("struct_size", c_uint32),
        ("num_threads source_dtype pool_dtype kv_heads head_dim rblock_size layer num_layers rotated", c_int32),
        ("num_tokens num_blocks", c_int64),
        ("k v", c_void_p),
        ("k_token_stride k_head_stride v_token_stride v_head_stride", c_int64),
        ("cos sin pool slots", c_void_p),
    )


class Pack(Structure):
    _fields_ = _fields(
        ("struct_size", c_uint32),
        ("num_threads from_dtype kv_heads head_dim rblock_size from_layer from_layers layer num_layers", c_int32),
        ("from_blocks num_blocks count", c_int64),
        ("source pool from_ids block_ids", c_void_p),
    )


class Rope(Structure):
    _fields_ = _fields(
        ("struct_size", c_uint32),
        ("num_threads dtype num_heads head_dim rotated", c_int32),
        ("num_tokens token_stride head_stride", c_int64),
        ("x cos sin out", c_void_p),
    )


class Sample(Structure):
    _fields_ = _fields(
        ("struct_size", c_uint32),
        ("num_threads dtype", c_int32),
        ("num_rows vocabulary row_stride", c_int64),
        ("logits temperatures top_ps min_ps top_ks uniforms token_ids", c_void_p),
    )


class Linear(Structure):
    _fields_ = _fields(
        ("struct_size", c_uint32),
        ("num_threads", c_int32),
        ("num_rows num_inputs num_outputs x_stride w_stride y_stride", c_int64),
        ("x w y", c_void_p),
    )


def load_library(path: Path = PATH) -> ctypes.CDLL | None:
    """None where the package was installed without a C++ compiler."""
    if not path.exists():
        return None
    library = ctypes.CDLL(str(path))
    pointer, int64, int32 = c_void_p, c_int64, c_int32
    signatures = {
        "distkv_micro_attention": (int32, [POINTER(Attention)]),
        "distkv_store_kv": (int32, [POINTER(Store)]),
        "distkv_pack_rblocks": (int32, [POINTER(Pack)]),
        "distkv_apply_rope": (int32, [POINTER(Rope)]),
        "distkv_sample": (int32, [POINTER(Sample)]),
        "distkv_linear": (int32, [POINTER(Linear)]),
        "distkv_merge": (int32, [pointer, pointer, int64, int64, int64, pointer, pointer, int32]),
        "distkv_gather": (int32, [pointer, int64, int64, pointer, int64, pointer, int32]),
        "distkv_scatter": (int32, [pointer, pointer, int64, int64, pointer, int64, int32]),
        "distkv_isa": (c_char_p, []),
        "distkv_use_isa": (int32, [c_char_p]),
        "distkv_read_probe": (c_float, [pointer, pointer, int64, int64, int64, int32]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def check(status: int) -> None:
    if status:
        kind, sentence = _FAULTS[status]
        raise kind(sentence)


def check_indices(*tensors: torch.Tensor) -> None:
    for tensor in tensors:
        if tensor.dtype is not torch.int64 or not tensor.is_contiguous():
            raise ValueError("indices must be contiguous int64 tensors")


def head_stride(x_BLKX: torch.Tensor) -> int:
    """Elements from one head `[...]` of `[B, L, K, ...]` to the next, with the gap between them, if there is one.

    Raises ValueError where they do not lie at even distances, or are not contiguous themselves.
    """
    width = x_BLKX[0, 0, 0].numel()
    if x_BLKX.is_contiguous():
        return width
    try:
        heads = x_BLKX.view(-1, *x_BLKX.shape[3:])
    except RuntimeError:
        raise ValueError("heads of a pool, and their scales, must lie at even distances") from None
    if not heads[0].is_contiguous():
        raise ValueError("heads of a pool, and their scales, must be contiguous")
    return heads.stride(0) if len(heads) > 1 else width


library = load_library()
