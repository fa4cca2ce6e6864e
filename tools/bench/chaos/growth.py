"""Whether one life of a process keeps more with every request, told from what starting, warming up and faults move.

| warm-up | window 1 | window 2 | window 3 | window 4 |     each with a quarter of the requests
           median     median     median     median

Something that is kept per request grows from each window to the next. What a fault moves, once, grows in one of them;
what a fault holds for a moment, no median sees.
"""

from collections.abc import Sequence
from itertools import pairwise
from statistics import median
from typing import NamedTuple

from tools.bench.chaos.kept import Kept

MIB = 1 << 20
NUM_WINDOWS = 4
WARM_UP_REQUESTS = 8  # the first ones: kernels, arenas, channels to the other members
MIN_REQUESTS = 16  # after the warm-up; a shorter life tells nothing
# Per request, from each window to the next one: more is a leak. Less is what faults and caches move in a short life.
MOST_PER_REQUEST = Kept(memory=MIB / 8, files=0.2, threads=0.2, shared_memory_files=0.2)
# In all: less is no leak yet, whatever its slope. Channels to the others, here and there, and connections to a slow
# ledger are opened one by one when first needed: a life of forty requests ends before there are all.
LEAST_GROWTH = Kept(memory=16 * MIB, files=32, threads=16, shared_memory_files=16)
_UNITS = Kept(MIB, 1, 1, 1)
_NOUNS = Kept("MiB", "files", "threads", "shared-memory files")  # type: ignore[arg-type]


class Sample(NamedTuple):
    """What a process kept when it had had so many requests."""

    num_requests: float
    kept: Kept


def leak(samples: Sequence[Sample]) -> Kept | None:
    """What is kept per request; 0 where it is nothing. None where the life was too short to tell."""
    windows = _windows(samples)
    if windows is None:
        return None
    num_requests = [median(sample.num_requests for sample in window) for window in windows]
    steps = [after - before for before, after in pairwise(num_requests)]
    per_request = []
    for kind in range(len(Kept._fields)):
        levels = [median(sample.kept[kind] for sample in window) for window in windows]
        growth = [after - before for before, after in pairwise(levels)]
        grows = all(more > MOST_PER_REQUEST[kind] * step for more, step in zip(growth, steps, strict=True))
        total = levels[-1] - levels[0]
        is_leak = grows and total > LEAST_GROWTH[kind]
        per_request.append(total / (num_requests[-1] - num_requests[0]) if is_leak else 0.0)
    return Kept(*per_request)


def growth(samples: Sequence[Sample]) -> Kept | None:
    """From the first window to the last, leak or not; None where the life was too short to tell."""
    windows = _windows(samples)
    if windows is None:
        return None
    kinds = range(len(Kept._fields))
    first, last = ([median(x.kept[kind] for x in window) for kind in kinds] for window in (windows[0], windows[-1]))
    return Kept(*(after - before for before, after in zip(first, last, strict=True)))


def describe(name: str, leaked: Kept) -> str | None:
    """In one sentence; None where nothing is leaked."""
    parts = [
        f"{amount / unit:.1f} {noun}" for amount, unit, noun in zip(leaked, _UNITS, _NOUNS, strict=True) if amount > 0
    ]
    return f"{name} keeps about {' and '.join(parts)} per request" if parts else None


def _windows(samples: Sequence[Sample]) -> list[list[Sample]] | None:
    if not samples:
        return None
    begin, end = samples[0].num_requests + WARM_UP_REQUESTS, samples[-1].num_requests
    if end - begin < MIN_REQUESTS:
        return None
    size = (end - begin) / NUM_WINDOWS
    windows: list[list[Sample]] = [[] for _ in range(NUM_WINDOWS)]
    for sample in samples:
        if sample.num_requests >= begin:
            windows[min(NUM_WINDOWS - 1, int((sample.num_requests - begin) / size))].append(sample)
    return windows if all(windows) else None
