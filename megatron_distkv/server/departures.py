"""How quickly a queue moves, and so how long one more would wait."""

import math
from collections import deque

from megatron_distkv.clock import Clock

# Departures longer ago say little of the load now.
WINDOW_S = 30.0
# Clients of OpenAI's library take no longer advice than this.
RETRY_AT_MOST_S = 60


class Departures:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._start_s = clock.monotonic_s()
        self._left_s: deque[float] = deque()

    def note(self) -> None:
        self._left_s.append(self._clock.monotonic_s())
        self._forget_old()

    def retry_after_s(self, num_queued: int) -> int:
        """When all that wait now will have left at the rate of the last while, in whole seconds (Little's law)."""
        self._forget_old()
        if not self._left_s:
            return RETRY_AT_MOST_S
        rate = len(self._left_s) / max(1.0, min(WINDOW_S, self._clock.monotonic_s() - self._start_s))
        return max(1, min(RETRY_AT_MOST_S, math.ceil((num_queued + 1) / rate)))

    def __len__(self) -> int:
        """Those that are remembered."""
        return len(self._left_s)

    def _forget_old(self) -> None:
        while self._left_s and self._left_s[0] < self._clock.monotonic_s() - WINDOW_S:
            self._left_s.popleft()
