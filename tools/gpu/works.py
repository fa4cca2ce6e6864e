"""Runs the works of `tools.bench.gpu_attention` in child processes, and reports what they tell.

One child does them all, until one ends it, hangs or breaks the GPU for those after it. That work is tried once more,
alone and without peers, because a library may have done it; then the rest goes on.
"""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tools.gpu.child import Child
from tools.gpu.report import Report

ROOT = Path(__file__).resolve().parents[2]
BENCH = (sys.executable, "-m", "tools.bench.gpu_attention")
LONGEST_SILENCE_S = 90.0  # of a work: its kernels are compiled, checked and timed


class Outcome(NamedTuple):
    done: set[str]  # have their figure, or failed without harm to others
    broken: str | None  # the work that ended the child
    why: str


def measure(
    report: Report, works: Sequence[str], options: Sequence[str], deadline: float, bench: Sequence[str] = BENCH
) -> None:
    """`works` by name; `options` of the bench; `deadline` of the monotonic clock."""
    left, suspects = list(works), set[str]()
    while left and time.monotonic() < deadline:
        is_alone = left[0] in suspects
        command = [*bench, *options, *["--without-peers"] * is_alone, "--works", *(left[:1] if is_alone else left)]
        outcome = _listen(report, Child(command, ROOT), deadline)
        left = [name for name in left if name not in outcome.done]
        if time.monotonic() >= deadline:
            break
        if outcome.broken is None:
            if not outcome.done:
                report.add_fault(f"works could not begin: {outcome.why}")
                break
        elif outcome.broken in suspects:
            report.add_fault(f"{outcome.broken}: {outcome.why}")
            left.remove(outcome.broken)
        else:
            suspects.add(outcome.broken)
    for name in left:
        report.add_not_run(name)


def _listen(report: Report, child: Child, deadline: float) -> Outcome:
    done, begun, why = set[str](), None, ""
    for line in child.lines(LONGEST_SILENCE_S, deadline):
        told = _told(line)
        if "begun" in told:
            begun = told["begun"]
        elif "figure" in told:
            report.add_figure(told["figure"])
            done.add(str(begun))
            begun = None
        elif told.get("is_gpu_broken"):
            why = told["failed"]
        elif "failed" in told:
            report.add_fault(f"{begun}: {told['failed']}")
            done.add(str(begun))
            begun = None
    if not why:
        why = "it was silent for too long" if child.is_late else f"its process ended with {child.status}"
    return Outcome(done, begun, why)


def _told(line: str) -> dict:
    """Libraries print things of their own."""
    try:
        told = json.loads(line)
    except ValueError:
        told = None
    if isinstance(told, dict):
        return told
    print(line, flush=True)
    return {}
