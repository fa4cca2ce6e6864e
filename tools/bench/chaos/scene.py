"""What a fault finds: the pool, which of its parts are whole, and what else is broken at this moment."""

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tools.bench.chaos.gateways import Gateways
from tools.bench.chaos.pool import LEDGER, Pool

# At least this many instances serve: a request must have somewhere to go. Of gateways, one.
NUM_SPARED, NUM_SPARED_GATEWAYS = 2, 1
# A part told to leave has ended by then, or is taken for one that stays.
LEAVES_WITHIN_S = 30.0
# A part that is started again serves by then, also beside other work; it may take several attempts.
SERVES_WITHIN_S = 240.0
# A fault's course: it goes on at every tick, and is over at its end. What it waits for, it yields for.
Course = Iterator[None]


class Scene:
    """From the main thread only, which the children are tied to."""

    def __init__(self, pool: Pool, gateways: Gateways) -> None:
        self.pool = pool
        self.gateways = gateways
        self.counts: Counter[str] = Counter()
        self.failures: list[tuple[str, str]] = []  # kind of fault, and what the pool did not survive
        self.is_ending = False  # nobody waits for a time any more
        self._broken: set[str] = set()

    @contextmanager
    def breaking(self, kind: str, part: str) -> Iterator[None]:
        """A fault of this kind is counted, and the part is not whole until the end of the block."""
        self.counts[kind] += 1
        self._broken.add(part)
        try:
            yield
        finally:
            self._broken.discard(part)

    def fail(self, kind: str, sentence: str) -> None:
        self.failures.append((kind, sentence))

    def is_broken(self, part: str) -> bool:
        return part in self._broken

    def whole(self, names: list[str]) -> list[str]:
        """Those that serve: one that is started again may take a while on a busy machine."""
        return [name for name in names if name not in self._broken and self.pool.serves(name)]

    def pick(self, rng: random.Random, names: list[str]) -> str | None:
        whole = self.whole(names)
        return rng.choice(whole) if whole else None

    def pick_instance(self, rng: random.Random) -> str | None:
        whole = self.whole(self.pool.instance_ids)
        return rng.choice(whole) if len(whole) > NUM_SPARED else None

    def pick_gateway(self, rng: random.Random) -> str | None:
        whole = self.whole(list(self.gateways.base_urls))
        return rng.choice(whole) if len(whole) > NUM_SPARED_GATEWAYS else None

    # ------------------------------------------------------------------ to wait for: `yield from`

    def wait(self, for_s: float) -> Course:
        end_s = time.monotonic() + for_s
        while time.monotonic() < end_s and not self.is_ending:
            yield

    def until(self, is_so: Callable[[], bool], within_s: float) -> Iterator[None]:
        """Also when the run is ending. What it was waited for may still not be so."""
        end_s = time.monotonic() + within_s
        while not is_so() and time.monotonic() < end_s:
            yield

    def bring_back(self, kind: str, part: str) -> Course:
        """Start a dead part until it serves: the ledger may be away, and the part ends then."""
        pool = self.pool
        end_s = time.monotonic() + SERVES_WITHIN_S
        while not pool.serves(part):
            if time.monotonic() > end_s:
                self.fail(kind, f"{part} did not serve again within {SERVES_WITHIN_S:.0f} s: {self.last_words(part)}")
                return
            if not pool.child(part).is_running and not self.is_broken(LEDGER):
                pool.restart(part)
            yield

    def last_words(self, part: str) -> str:
        child = self.pool.child(part)
        return child.error_line() if child.log.exists() else "no output"
