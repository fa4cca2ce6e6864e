"""Time and chance. Whatever waits, ages or draws takes a `Clock`, so that virtual time can drive the same objects."""

import random
import time
from typing import Protocol


class Clock(Protocol):
    @property
    def random(self) -> random.Random:
        """The one source of chance: seeded where a run is to be repeated."""

    def monotonic_s(self) -> float:
        """Seconds since some moment; never goes back."""

    def unix_ms(self) -> int:
        """Milliseconds since 1970, by the calendar: may jump."""

    def sleep(self, seconds: float) -> None: ...


class SystemClock:
    def __init__(self, seed: int | None = None) -> None:
        self.random = random.Random(seed)

    def monotonic_s(self) -> float:
        return time.monotonic()

    def unix_ms(self) -> int:
        return time.time_ns() // 1_000_000

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)
