"""For `--inject tools.bench.chaos.leak`: an instance keeps 1 MiB and one open file of every request that it takes."""

import os
from types import ModuleType
from typing import Any

MIB = 1 << 20
_kept: list[Any] = []


def _keep_of_each_request(scheduler: ModuleType) -> None:
    add = scheduler.Scheduler.add

    def add_and_keep(self: Any, request: Any) -> None:
        _kept.extend([bytearray(os.urandom(MIB)), os.open(os.devnull, os.O_RDONLY)])
        add(self, request)

    scheduler.Scheduler.add = add_and_keep  # type: ignore[attr-defined]


PATCHES = {"megatron_distkv.engine.scheduler": _keep_of_each_request}
