"""Our own kernels, the fastest that can serve a call's tensors: what libraries leave to us."""

import importlib
import importlib.util
import os
from functools import cache
from types import ModuleType

import torch

from . import cpu, reference


@cache
def has_triton() -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"


def best_for(*tensors: torch.Tensor) -> ModuleType:
    """`tensors`: all of a call that are not indices."""
    if cpu.is_built() and cpu.can_serve(*tensors):
        return cpu
    if tensors[0].is_cuda and has_triton():
        triton = importlib.import_module(f"{__package__}.triton")  # it takes its time
        if triton.can_serve(*tensors):
            return triton
    return reference


def merge(
    outs_PTHD: torch.Tensor, lses_PTH: torch.Tensor, out: tuple[torch.Tensor, torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    out_THD, lse_TH = best_for(outs_PTHD, lses_PTH).merge(outs_PTHD, lses_PTH, out)
    return out_THD, lse_TH


def store_kv(
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    pool_BLK2ND: torch.Tensor,
    layer: int,
    slot_mapping_T: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    best_for(k_TKD, v_TKD, pool_BLK2ND).store_kv(k_TKD, v_TKD, pool_BLK2ND, layer, slot_mapping_T, angles)


def apply_rope(x_THD: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor) -> torch.Tensor:
    turned: torch.Tensor = best_for(x_THD).apply_rope(x_THD, cos_TR, sin_TR)
    return turned


def gather_rblocks(pool_BLK2ND: torch.Tensor, block_ids: torch.Tensor) -> torch.Tensor:
    gathered: torch.Tensor = best_for(pool_BLK2ND).gather_rblocks(pool_BLK2ND, block_ids)
    return gathered


def scatter_rblocks(data_MLK2ND: torch.Tensor, pool_BLK2ND: torch.Tensor, block_ids: torch.Tensor) -> None:
    best_for(pool_BLK2ND).scatter_rblocks(data_MLK2ND, pool_BLK2ND, block_ids)
