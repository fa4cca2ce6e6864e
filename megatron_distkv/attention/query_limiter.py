"""How much of a creditor's time its debtors may have while it has work of its own."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_distkv.clock import Clock

# Between two steps that follow each other an instance counts as busy for this long.
STILL_BUSY_S = 0.05
# What debtors may have used up ahead, in seconds of the creditor's time: so that short bursts are not throttled.
BURST_S = 0.02
# A query is never throttled for longer: debtors' deadlines run.
MAX_WAIT_S = 0.25


class QueryLimiter:
    """`share` of the time that own steps take, on average; all of it (1.0, or no own work) is no bound.

    A token bucket: it fills with `share` seconds a second, answers empty it, and while it is empty queries wait.
    """

    def __init__(self, share: float, clock: Clock) -> None:
        self._share = share
        self._clock = clock
        self._left_s = share * BURST_S
        self._filled_at_s = self._clock.monotonic_s()
        self._num_own = 0
        self._busy_until_s = float("-inf")
        self._lock = threading.Lock()

    @property
    def is_busy(self) -> bool:
        return self._num_own > 0 or self._clock.monotonic_s() < self._busy_until_s

    @contextmanager
    def own_work(self) -> Iterator[None]:
        """A step of this rank's own."""
        with self._lock:
            self._num_own += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_own -= 1
                self._busy_until_s = self._clock.monotonic_s() + STILL_BUSY_S

    @contextmanager
    def turn(self) -> Iterator[float]:
        """Answer a query inside; gives for how long that was throttled, in seconds."""
        throttled_s = self._wait()
        began_s = self._clock.monotonic_s()
        try:
            yield throttled_s
        finally:
            with self._lock:
                self._left_s -= self._clock.monotonic_s() - began_s

    def _wait(self) -> float:
        began_s = self._clock.monotonic_s()
        while (lacking_s := self._lacking_s()) > 0:
            left_s = began_s + MAX_WAIT_S - self._clock.monotonic_s()
            if left_s <= 0:
                break
            self._clock.sleep(min(lacking_s, left_s))
        return self._clock.monotonic_s() - began_s

    def _lacking_s(self) -> float:
        """Until there is something in the bucket; 0 where nothing is bounded."""
        with self._lock:
            now_s = self._clock.monotonic_s()
            self._left_s = min(self._share * BURST_S, self._left_s + self._share * (now_s - self._filled_at_s))
            self._filled_at_s = now_s
            if self._share >= 1.0 or self._left_s > 0 or not self.is_busy:
                return 0.0
            return max(-self._left_s / self._share, 1e-4)
