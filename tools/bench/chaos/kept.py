"""What a process keeps: its own memory, files, threads and shared memory, as the kernel counts them (Linux)."""

from pathlib import Path
from typing import NamedTuple

KIB = 1 << 10
_OWN_MEMORY = ("RssAnon", "RssShmem", "VmSwap")
_SHARED_MEMORY = ("/memfd:", "/dev/shm/")


class Kept(NamedTuple):
    """`memory`: bytes of its own, resident or swapped out.

    Not the pages of files: they are the libraries', come with their first use, and their share in PSS jumps whenever
    another process that maps them starts or ends.
    """

    memory: float
    files: float
    threads: float
    shared_memory_files: float


def kept_by(pid: int) -> Kept | None:
    """None where there is no such process any more."""
    process = Path("/proc", str(pid))
    try:
        status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
        maps = (process / "maps").read_text()
        num_files = len(list((process / "fd").iterdir()))
    except OSError:
        return None
    if not maps:  # it has ended and waits for its parent
        return None
    memory = KIB * sum(int(status.get(key, "0").split()[0]) for key in _OWN_MEMORY)
    mapped = sum(any(mark in line for mark in _SHARED_MEMORY) for line in maps.splitlines())
    return Kept(memory, num_files, int(status["Threads"]), mapped)
