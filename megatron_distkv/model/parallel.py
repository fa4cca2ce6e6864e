"""Tensor parallelism of this process: torch.distributed, Megatron's groups, and gathering the vocabulary's parts."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_distkv.errors import ConfigError


@dataclass(frozen=True)
class TensorParallel:
    """This process's place among the ranks that share each layer."""

    rank: int = 0
    size: int = 1

    @property
    def is_leader(self) -> bool:
        return self.rank == 0


def init_tensor_parallel(size: int, context_parallel: int = 1) -> TensorParallel:
    """Join the launcher's process group (or make one of this process alone) and split it into groups of `size`.

    Every `context_parallel` of those share each sequence in training; the rest of the ranks are data parallel.
    Raises ConfigError when the launcher started a number of ranks that they do not divide.
    """
    if not dist.is_initialized():
        _init_process_group()
    world = dist.get_world_size()
    if world % (size * context_parallel):
        asked = f"tensor_parallel {size}" + (f" x context_parallel {context_parallel}" if context_parallel > 1 else "")
        raise ConfigError(f"{asked} does not divide the {world} processes that the launcher started")
    if not parallel_state.model_parallel_is_initialized():
        with _one_group_for_the_same_ranks():
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=size, context_parallel_size=context_parallel
            )
    return TensorParallel(
        parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    )


@contextmanager
def _one_group_for_the_same_ranks() -> Iterator[None]:
    """Megatron makes more than twenty groups, most of them of the same ranks. Each of gloo's has a thread that wakes a
    hundred times a second: together they cost an idle instance 2 % of a core."""
    create, made = parallel_state.create_group, {}

    def create_once(ranks: list[int], timeout: Any = None, backend: str | None = None, **settings: Any) -> Any:
        key = (tuple(ranks), backend or dist.get_backend())
        if key not in made:
            made[key] = create(ranks, timeout=timeout, backend=backend, **settings)
        return made[key]

    parallel_state.create_group = create_once
    try:
        yield
    finally:
        parallel_state.create_group = create


def _init_process_group() -> None:
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)


def leave_tensor_parallel() -> None:
    """Undo `init_tensor_parallel`: this process has no groups any more."""
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def gather_vocabulary(logits_RV: torch.Tensor) -> torch.Tensor:
    """Each rank's slice of the vocabulary `[R, V / TP]` -> all of it `[R, V]`, on every rank."""
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1:
        return logits_RV
    parts = [torch.empty_like(logits_RV) for _ in range(group.size())]
    dist.all_gather(parts, logits_RV.contiguous(), group=group)
    return torch.cat(parts, dim=-1)
