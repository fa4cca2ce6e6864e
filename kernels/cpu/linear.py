"""Linear layers in bf16, in C++. Contract: megatron_distkv/ops/linear.py."""

import ctypes

import torch

from .library import Linear, check, library

# Where CPUs multiply bf16 themselves, torch's library is the faster one for more rows; elsewhere it never is.
MOST_ROWS = {b"avx512bf16": 32}


def most_linear_rows() -> float:
    return MOST_ROWS.get(library.distkv_isa(), float("inf"))


def linear(x_MK: torch.Tensor, w_NK: torch.Tensor) -> torch.Tensor:
    x_MK, w_NK = (x if x.stride(1) == 1 else x.contiguous() for x in (x_MK, w_NK))
    y_MN = x_MK.new_empty(len(x_MK), len(w_NK))
    args = Linear(
        ctypes.sizeof(Linear), torch.get_num_threads(), *x_MK.shape, len(w_NK), x_MK.stride(0), w_NK.stride(0),
        y_MN.stride(0), x_MK.data_ptr(), w_NK.data_ptr(), y_MN.data_ptr(),
    )  # fmt: skip
    check(library.distkv_linear(ctypes.byref(args)))
    return y_MN
