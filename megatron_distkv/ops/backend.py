"""Which kernels run: chosen once per process; `auto` takes the best that can serve the tensors of a call.

cpu          C++ for CPUs, where the package was installed with a compiler
reference    plain torch, anywhere
"""

from types import ModuleType

import torch

from megatron_distkv.errors import ConfigError
from megatron_distkv.kernels import cpu, reference

_BACKENDS: dict[str, ModuleType] = {"cpu": cpu, "reference": reference} if cpu.is_built() else {"reference": reference}
_BEST_IS_CPU = "cpu" in _BACKENDS
_chosen = "auto"


def available_backends() -> list[str]:
    """Best first."""
    return list(_BACKENDS)


def backend_in_use() -> str:
    """What serves tensors on the CPU, of the dtypes that models and KV have."""
    return available_backends()[0] if _chosen == "auto" else _chosen


def instruction_set() -> str | None:
    """Which variant of the C++ kernels this machine runs; None where they were not built."""
    return cpu.instruction_set() if cpu.is_built() else None


def use_backend(name: str) -> None:
    """Switch this process to backend `name` or `auto`; raises ConfigError, naming those that this machine has."""
    global _chosen
    if name != "auto" and name not in _BACKENDS:
        raise ConfigError(f"no kernel backend {name!r} here; available: auto, {', '.join(_BACKENDS)}")
    _chosen = name


def kernels(*tensors: torch.Tensor) -> ModuleType:
    """The module with the functions that serve `tensors`: all of a call that are not indices."""
    if _chosen == "auto":
        return cpu if _BEST_IS_CPU and cpu.can_serve(*tensors) else reference
    return _BACKENDS[_chosen]
