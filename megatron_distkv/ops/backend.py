"""Which kernels run: one backend per process, chosen once at start."""

from types import ModuleType

from megatron_distkv.errors import ConfigError
from megatron_distkv.kernels import reference

_BACKENDS: dict[str, ModuleType] = {"reference": reference}
_in_use = "reference"


def available_backends() -> list[str]:
    return list(_BACKENDS)


def backend_in_use() -> str:
    return _in_use


def use_backend(name: str) -> None:
    """Switch this process to backend `name`; raises ConfigError, naming those that this machine has."""
    global _in_use
    if name not in _BACKENDS:
        raise ConfigError(f"no kernel backend {name!r} here; available: {', '.join(_BACKENDS)}")
    _in_use = name


def kernels() -> ModuleType:
    """The module that holds the functions of the backend in use."""
    return _BACKENDS[_in_use]
