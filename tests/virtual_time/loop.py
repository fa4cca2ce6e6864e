"""An event loop whose time is a virtual clock's: where it would sleep, the clock goes on."""

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

from tests.virtual_time.clock import VirtualClock

_T = TypeVar("_T")


class _Selector(selectors.SelectSelector):
    def __init__(self, clock: VirtualClock) -> None:
        super().__init__()
        self._clock = clock

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "nothing will ever happen"
            self._clock.now_s += timeout
        return ready


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self, clock: VirtualClock) -> None:
        super().__init__(_Selector(clock))
        self._virtual = clock

    def time(self) -> float:
        return self._virtual.now_s


def run(clock: VirtualClock, story: Coroutine[Any, Any, _T]) -> _T:
    with asyncio.Runner(loop_factory=lambda: _Loop(clock)) as runner:
        return runner.run(story)
