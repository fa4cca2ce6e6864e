"""Tokens out of logits, in C++. Contract: megatron_distkv/ops/sampling.py."""

import ctypes

import torch

from .library import DTYPES, Sample, check, library


def sample(
    logits_RV: torch.Tensor,
    temperature_R: torch.Tensor,
    top_k_R: torch.Tensor,
    top_p_R: torch.Tensor,
    min_p_R: torch.Tensor,
    uniform_R: torch.Tensor,
) -> torch.Tensor:
    if logits_RV.stride(1) != 1:
        logits_RV = logits_RV.contiguous()
    token_id_R = torch.empty(len(logits_RV), dtype=torch.int64)
    args = Sample(
        ctypes.sizeof(Sample), torch.get_num_threads(), DTYPES[logits_RV.dtype], *logits_RV.shape, logits_RV.stride(0),
        logits_RV.data_ptr(), temperature_R.data_ptr(), top_p_R.data_ptr(), min_p_R.data_ptr(), top_k_R.data_ptr(),
        uniform_R.data_ptr(), token_id_R.data_ptr(),
    )  # fmt: skip
    check(library.distkv_sample(ctypes.byref(args)))
    return token_id_R
