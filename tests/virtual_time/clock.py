"""Time that passes when a test says so, and draws that are the same each time."""

import random


class VirtualClock:
    """Who sleeps by it lets it pass."""

    def __init__(self, now_s: float = 1000.0, seed: int = 1) -> None:
        self.now_s = now_s
        self.random = random.Random(seed)

    def monotonic_s(self) -> float:
        return self.now_s

    def unix_ms(self) -> int:
        return 1_700_000_000_000 + int(self.now_s * 1000)

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds
