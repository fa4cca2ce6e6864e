"""The gateways of a pool as their clients know them: where they are, and since when one has been away."""

import random
import threading
import time
from collections.abc import Mapping


class Gateways:
    """Any thread may ask. `note_killed` and `note_back` by who does that."""

    def __init__(self, base_urls: Mapping[str, str]) -> None:
        self.base_urls = dict(base_urls)
        self._back_s: dict[str, float] = {}  # when one that was killed served again; infinite until it does
        self._lock = threading.Lock()

    def pick(self, rng: random.Random, other_than: str | None = None) -> str:
        return rng.choice([name for name in self.base_urls if name != other_than])

    def note_killed(self, name: str) -> None:
        with self._lock:
            self._back_s[name] = float("inf")

    def note_back(self, name: str) -> None:
        with self._lock:
            self._back_s[name] = time.monotonic()

    def was_away(self, name: str, since_s: float) -> bool:
        """At any moment since then, on the clock of `time.monotonic`."""
        with self._lock:
            return self._back_s.get(name, 0.0) >= since_s
