"""Megatron-core, imported without torch's compiler.

Megatron puts torch.compile around fused functions that our settings never call. Merely naming it imports a compiler:
a third of the time that a process needs before it can serve.
"""

from collections.abc import Callable
from typing import Any

import torch


def _as_it_is(function: Callable[..., Any] | None = None, **_: Any) -> Callable[..., Any]:
    return _as_it_is if function is None else function


_compile, torch.compile = torch.compile, _as_it_is  # type: ignore[assignment]
try:
    import megatron.core.jit
finally:
    torch.compile = _compile

__all__ = ["megatron"]
