"""Watches what every process of a pool keeps, each life of a part by itself: what is killed has given all back."""

import threading
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from tools.bench.chaos.growth import MIB, Sample, describe, growth, leak
from tools.bench.chaos.kept import Kept, kept_by
from tools.bench.chaos.pool import Pool

SAMPLE_INTERVAL_S = 0.5
Life = tuple[str, int]  # a part's name and its process


class Processes:
    """A thread that looks, until the end of the `with` block.

    `num_requests_of(name)`: how many requests that part has had so far.
    """

    def __init__(self, pool: Pool, num_requests_of: Callable[[str], float]) -> None:
        self._pool = pool
        self._num_requests_of = num_requests_of
        self._samples: dict[Life, list[Sample]] = defaultdict(list)
        self._stop = threading.Event()
        self._watching = ThreadPoolExecutor(1)

    def __enter__(self) -> "Processes":
        self._watched = self._watching.submit(self._run)
        return self

    def __exit__(self, *_: object) -> None:
        """Raises what ended the watch too early: a run that nobody watched has not passed."""
        self._stop.set()
        self._watching.shutdown()
        self._watched.result()

    def leaks(self) -> list[str]:
        """A sentence for each life that keeps more with every request."""
        found = ((name, leak(samples)) for (name, _), samples in self._samples.items())
        sentences = [describe(name, leaked) for name, leaked in found if leaked is not None]
        return [sentence for sentence in sentences if sentence is not None]

    @property
    def num_judged(self) -> int:
        return sum(leak(samples) is not None for samples in self._samples.values())

    def has_judged(self, names: list[str]) -> bool:
        """At least one life of one of these parts."""
        return any(name in names and leak(samples) is not None for (name, _), samples in self._samples.items())

    @property
    def num_lives(self) -> int:
        return len(self._samples)

    def greatest_growth(self) -> dict[str, float]:
        """Of the lives that could be judged, after their warm-up; memory in MiB."""
        grown = [x for x in (growth(samples) for samples in self._samples.values()) if x is not None]
        greatest = Kept(*(max(values) for values in zip(*grown, strict=True))) if grown else Kept(0, 0, 0, 0)
        return {**greatest._asdict(), "memory": round(greatest.memory / MIB, 1)}

    def _run(self) -> None:
        while not self._stop.wait(SAMPLE_INTERVAL_S):
            for name, pid in self._pool.pids.items():
                kept = kept_by(pid)
                if kept is not None:
                    self._samples[name, pid].append(Sample(self._num_requests_of(name), kept))
