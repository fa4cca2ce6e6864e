"""What chaos takes for a leak in one life of a process, and what not."""

import os
import random
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from tools.bench.chaos.growth import MIB, Sample, describe, growth, leak
from tools.bench.chaos.kept import Kept, kept_by

START = Kept(memory=200 * MIB, files=40, threads=12, shared_memory_files=6)


def a_life(num_requests: int, keeps: Callable[[int], Kept]) -> list[Sample]:
    """A sample at each request; what running requests hold for a while makes it rough."""
    rng = random.Random(1)
    samples = []
    for number in range(num_requests):
        kept = keeps(number)
        rough = Kept(rng.uniform(0, 2 * MIB), rng.randrange(4), rng.randrange(3), rng.randrange(2))
        samples.append(Sample(number, Kept(*(sum(x) for x in zip(START, kept, rough, strict=True)))))
    return samples


def nothing(number: int, **but: int) -> Kept:
    return Kept(**{"memory": 0, "files": 0, "threads": 0, "shared_memory_files": 0, **but})


def test_a_mebibyte_and_a_file_per_request_are_a_leak() -> None:
    leaked = leak(a_life(80, lambda number: Kept(number * MIB, number, 0, 0)))
    assert leaked is not None
    assert describe("instance-1", leaked) == "instance-1 keeps about 1.0 MiB and 1.0 files per request"


@pytest.mark.parametrize("kind", ["threads", "shared_memory_files"])
def test_threads_and_shared_memory_are_looked_at_too(kind: str) -> None:
    leaked = leak(a_life(80, lambda number: nothing(number, **{kind: number})))
    assert leaked is not None
    assert getattr(leaked, kind) == pytest.approx(1.0, abs=0.15)
    assert leaked.memory == leaked.files == 0


def test_a_life_that_keeps_nothing_has_no_leak() -> None:
    leaked = leak(a_life(200, nothing))
    assert leaked is not None
    assert describe("instance-1", leaked) is None


def test_the_warm_up_does_not_count() -> None:
    leaked = leak(a_life(60, lambda number: Kept(8 * MIB * min(number, 8), 3 * min(number, 8), 0, 0)))
    assert leaked == Kept(0, 0, 0, 0)


def test_channels_that_are_opened_one_by_one_are_no_leak() -> None:
    """Seen after a restart: 0.5 files per request, and no more after the last member was met."""
    leaked = leak(a_life(40, lambda number: Kept(0, number // 2, number // 5, number // 5)))
    assert leaked == Kept(0, 0, 0, 0)


@pytest.mark.parametrize("at", [12, 20, 30, 38])
def test_what_a_fault_moves_once_is_no_leak(at: int) -> None:
    """A member came back: another channel, its mailbox, its thread."""
    samples = a_life(40, lambda number: Kept(40 * MIB, 20, 12, 8) if number >= at else nothing(number))
    assert leak(samples) == Kept(0, 0, 0, 0)


def test_what_is_held_for_a_moment_is_no_leak() -> None:
    samples = a_life(80, lambda number: Kept(90 * MIB, 60, 60, 0) if number % 20 > 16 else nothing(number))
    assert leak(samples) == Kept(0, 0, 0, 0)


def test_a_short_life_tells_nothing() -> None:
    samples = a_life(20, lambda number: Kept(number * MIB, number, 0, 0))
    assert leak(samples) is None
    assert growth(samples) is None
    assert leak([]) is None


def test_growth_is_told_whether_it_is_a_leak_or_not() -> None:
    grown = growth(a_life(40, lambda number: Kept(0, 10 if number > 30 else 0, 0, 0)))
    assert grown is not None
    assert grown.files == pytest.approx(10, abs=2)


def test_what_this_process_keeps_is_counted(tmp_path: Path) -> None:
    before = kept_by(os.getpid())
    assert before is not None
    memory = bytearray(b"x" * (32 * MIB))
    with ExitStack() as opened:
        for number in range(7):
            opened.enter_context((tmp_path / str(number)).open("w"))
        after = kept_by(os.getpid())
    assert after is not None
    assert after.files - before.files == 7
    assert after.memory - before.memory > 30 * MIB
    assert before.threads >= 1
    assert len(memory) == 32 * MIB


def test_a_process_that_is_gone_keeps_nothing() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert kept_by(ended.pid) is None
