"""Which kernels run: chosen once per process; `auto` takes the best that can serve the tensors of a call.

triton       kernels for GPUs, where Triton and a GPU (or Triton's interpreter, for tests) are at hand
cpu          C++ for CPUs, where the package was installed with a compiler
reference    plain torch, anywhere
flash_attn   torch's FlashAttention, or the package, for full rBlocks of the past; ours for the rest
flashinfer   the same with FlashInfer, where it is installed beside a GPU

The last two are taken where they are asked for, never by `auto`: on CPUs torch's is slower than ours
(docs/experiments.md), on GPUs neither has been measured.
"""

import importlib
from functools import cache
from types import ModuleType

import torch

from megatron_distkv.errors import ConfigError
from megatron_distkv.kernels import cpu, flash_attn, flashinfer
from megatron_distkv.kernels.native import best_for, has_triton

_CPU_IS_BUILT = cpu.is_built()
_chosen = "auto"


@cache
def available_backends() -> tuple[str, ...]:
    """Best first; then those that `auto` never takes."""
    ours = (("triton", has_triton()), ("cpu", cpu.is_built()), ("reference", True))
    libraries = (("flash_attn", flash_attn.is_here()), ("flashinfer", flashinfer.is_here()))
    return tuple(name for name, is_here in (*ours, *libraries) if is_here)


def backend_in_use() -> str:
    """What serves tensors on the CPU, of the dtypes that models and KV have."""
    return _chosen if _chosen != "auto" else "cpu" if cpu.is_built() else "reference"


def instruction_set() -> str | None:
    """Which variant of the C++ kernels this machine runs; None where they were not built."""
    return cpu.instruction_set() if cpu.is_built() else None


def use_backend(name: str) -> None:
    """Switch this process to backend `name` or `auto`; raises ConfigError, naming those that this machine has."""
    global _chosen
    if name not in ("auto", *available_backends()):
        raise ConfigError(f"no kernel backend {name!r} here; available: auto, {', '.join(available_backends())}")
    _chosen = name


def kernels(*tensors: torch.Tensor) -> ModuleType:
    """The module with the functions that serve `tensors`: all of a call that are not indices."""
    return best_for(*tensors) if _chosen == "auto" else _module(_chosen)


def cpu_comes_first() -> bool:
    """Whether the C++ kernels serve whatever they can serve."""
    return _CPU_IS_BUILT and _chosen in ("auto", "cpu")


@cache
def _module(name: str) -> ModuleType:
    """Triton is imported where it is used, not before: it takes its time."""
    return importlib.import_module(f"megatron_distkv.kernels.{name}")
