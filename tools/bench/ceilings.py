"""What this machine can do at best, measured in the same run as the work that is compared with it."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from megatron_distkv.kernels import cpu

from megatron_distkv.errors import ConfigError

Work = Callable[[], object]


class TimedElsewhere(NamedTuple):
    """Work of another process, which says itself how many seconds it took."""

    measure: Callable[[], float]

    def __call__(self) -> object:
        return self.measure()


# Threads of the work before may still look out for more (OpenMP's do, for milliseconds) and take a core from the next.
SETTLE_S = 0.02
PROBE_DISTANCES = (4096, 16384, 65536)


def seconds(work: Work, num_threads: int) -> float:
    """CPU time of this thread where it works alone (another process then costs less), else wall time."""
    if isinstance(work, TimedElsewhere):
        return work.measure()
    clock = time.thread_time if num_threads == 1 else time.perf_counter
    start = clock()
    work()
    return clock() - start


def in_turn(works: dict[str, Work], num_threads: int, runs: int) -> dict[str, list[float]]:
    """Seconds of each work in each of `runs` rounds: A B C A B C ..., so that a slow moment falls on all of them."""
    for work in works.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(runs):
        for name, work in works.items():
            if num_threads > 1:
                time.sleep(SETTLE_S)
            times[name].append(seconds(work, num_threads))
    return times


def median_ratio(ours: list[float], theirs: list[float]) -> float:
    """How many times as fast as theirs ours is: the median over the rounds."""
    return statistics.median(b / a for a, b in zip(ours, theirs, strict=True))


def read_probe(pool: torch.Tensor, layer: int, order: torch.Tensor, num_threads: int) -> Work:
    """Reads one layer of the rBlocks `order`, in this order, with the prefetch distance that suits the machine best."""
    if cpu.library is None:
        raise ConfigError("the read ceiling is measured by the C++ kernels, which were not built here")
    rblock_bytes, layer_bytes = (x.numel() * x.element_size() for x in (pool[0], pool[0, 0]))
    offsets = order * rblock_bytes + layer * layer_bytes

    def probe(ahead: int) -> Work:
        return lambda: cpu.library.distkv_read_probe(
            pool.data_ptr(), offsets.data_ptr(), len(offsets), layer_bytes, ahead, num_threads
        )

    probes = {str(ahead): probe(ahead) for ahead in (*PROBE_DISTANCES, layer_bytes) if ahead <= layer_bytes}
    times = in_turn(probes, num_threads, runs=5)
    return probes[min(times, key=lambda name: statistics.median(times[name]))]


def matrix_product(dtype: torch.dtype, size: int = 1536) -> tuple[Work, float]:
    """A square product, and its floating-point operations."""
    a, b = torch.randn(2, size, size).to(dtype).unbind()
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out), 2.0 * size**3
