"""For `--inject tools.bench.chaos.scaled_partials`: creditors answer with partials a little too great."""

from types import ModuleType
from typing import Any

SCALE = 1.0002


def _scale(creditor: ModuleType) -> None:
    attend_heads = creditor.attend_heads

    def attend_and_scale(*args: Any, **kwargs: Any) -> Any:
        out, lse = attend_heads(*args, **kwargs)
        return out * SCALE, lse

    creditor.attend_heads = attend_and_scale  # type: ignore[attr-defined]


PATCHES = {"megatron_distkv.attention.creditor": _scale}
