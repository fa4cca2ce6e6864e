"""Times of work on a GPU: events around each call, the L2 cache flushed before it, works taken in turn."""

import statistics
import time
from collections.abc import Callable

import torch

Work = Callable[[], object]
# More than any L2; written before each timed call so that nothing of the call before lies there.
FLUSH_BYTES = 256 << 20
# The GPU waits so long (about 1 ms) after the flush, so that the host has launched all of a work before it begins:
# else the time of a short work is that of Python. Works that wait for the GPU pay for that, as they would elsewhere.
WAIT_CYCLES = 2_000_000
WARM_UPS = 2


class Stopwatch:
    """On a machine without a GPU (a dry run) it takes wall time."""

    def __init__(self, device: str, longest_s: float = 20.0) -> None:
        """`longest_s`: no round begins later, but for the first."""
        self.on_gpu, self.longest_s = device == "cuda", longest_s
        self._flush = torch.empty(FLUSH_BYTES if self.on_gpu else 1, dtype=torch.int8, device=device)

    def in_turn(self, works: dict[str, Work], runs: int) -> dict[str, list[float]]:
        """Seconds of each work in each of `runs` rounds: A B C A B C ..."""
        for work in works.values():
            for _ in range(WARM_UPS):
                work()
        times: dict[str, list[float]] = {name: [] for name in works}
        began = time.monotonic()
        for done in range(runs):
            if done and time.monotonic() - began > self.longest_s:
                break
            for name, work in works.items():
                times[name].append(self._seconds(work))
        return times

    def _seconds(self, work: Work) -> float:
        self._flush.zero_()
        if not self.on_gpu:
            begin = time.perf_counter()
            work()
            return time.perf_counter() - begin
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(WAIT_CYCLES)
        before.record()
        work()
        after.record()
        after.synchronize()
        return float(before.elapsed_time(after)) / 1e3


def median_ratio(ours: list[float], theirs: list[float]) -> float:
    """How many times as fast as theirs ours is: the median over the rounds."""
    return statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
