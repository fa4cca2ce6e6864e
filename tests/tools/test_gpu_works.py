"""A machine with a GPU is at hand once: what fails there must cost only itself."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tools.gpu import works
from tools.gpu.conformance import judge
from tools.gpu.report import Report

# Does as the bench does. A work's name says what becomes of it.
BENCH = """
import json, os, sys, time
tell = lambda **what: print(json.dumps(what), flush=True)
is_alone = "--without-peers" in sys.argv
print("a library greets")
if "cannot begin" in sys.argv:
    sys.exit(1)
for name in sys.argv[sys.argv.index("--works") + 1:]:
    tell(begun=name)
    if name == "fails":
        tell(failed="WrongAnswerError: off", is_gpu_broken=False)
        continue
    if name == "crashes" or (name == "crashes with peers" and not is_alone):
        os.kill(os.getpid(), 11)
    if name == "breaks the GPU":
        tell(failed="AcceleratorError: illegal access", is_gpu_broken=True)
        sys.exit(3)
    if name == "hangs":
        if "PID_FILE" in os.environ:
            open(os.environ["PID_FILE"], "w").write(str(os.getpid()))
        time.sleep(60)
    figure = dict(work=name, value=1.0, ceiling=2.0, unit="GB/s", share=0.5, milliseconds=1.0, spread=0.0)
    tell(figure=figure | dict(peers={}, left_out={"all": "crash"} if is_alone else {}))
"""

CHECK = """
import signal, sys, time
from pathlib import Path
from tools.gpu import report, works

signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
found = report.Report(Path(sys.argv[1]), "a machine")
works.measure(found, ["first", "hangs"], (), time.monotonic() + 60, (sys.executable, "-c", sys.argv[2]))
"""


def measured(out: Path, names: list[str], *, seconds: float = 60.0, options: tuple[str, ...] = ()) -> Report:
    report = Report(out, "a machine")
    bench = (sys.executable, "-c", BENCH)
    works.measure(report, names, options, time.monotonic() + seconds, bench)
    return report


def on_disk(out: Path, key: str) -> list:
    return json.loads((out / "gpu_check.json").read_text())[key]


def test_a_work_that_fails_costs_only_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given works of which some answer wrong, crash, break the GPU or hang, one of them only because of a peer
    monkeypatch.setattr(works, "LONGEST_SILENCE_S", 2.0)
    names = ["first", "fails", "crashes with peers", "breaks the GPU", "hangs", "last"]

    # When they are measured
    measured(tmp_path, names)

    # Then all others have their figure, and the report on disk says what became of those
    assert [figure["work"] for figure in on_disk(tmp_path, "figures")] == ["first", "crashes with peers", "last"]
    assert on_disk(tmp_path, "faults") == [
        "fails: WrongAnswerError: off",
        "breaks the GPU: AcceleratorError: illegal access",
        "hangs: it was silent for too long",
    ]
    text = (tmp_path / "gpu_check.md").read_text()
    assert "| last | 1.0 GB/s | 2.0 GB/s | 0.50 |" in text
    assert "- FAILED: hangs: it was silent for too long." in text
    assert "- Left out: all (crash)." in text


def test_time_that_is_up_leaves_what_was_measured(tmp_path: Path) -> None:
    measured(tmp_path, ["first", "hangs", "last"], seconds=1.0)
    assert [figure["work"] for figure in on_disk(tmp_path, "figures")] == ["first"]
    assert on_disk(tmp_path, "not_run") == ["hangs", "last"]
    assert on_disk(tmp_path, "faults") == []


def test_a_bench_that_cannot_begin_is_said(tmp_path: Path) -> None:
    measured(tmp_path, ["first"], options=("cannot begin",))
    assert on_disk(tmp_path, "faults") == ["works could not begin: its process ended with 1"]


def test_who_stops_it_stops_its_works(tmp_path: Path) -> None:
    # Given a check whose work hangs
    pid_file = tmp_path / "pid"
    command = [sys.executable, "-c", CHECK, str(tmp_path), BENCH]
    check = subprocess.Popen(command, env=os.environ | {"PID_FILE": str(pid_file)})
    while not (pid_file.exists() and pid_file.read_text()):
        time.sleep(0.05)

    # When it is told to stop
    check.send_signal(signal.SIGTERM)

    # Then the work ends with it, and the figures before are on disk
    assert check.wait(20) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)
    assert [figure["work"] for figure in on_disk(tmp_path, "figures")] == ["first"]


def test_conformance_counts_what_was_written_before_time_was_up() -> None:
    text = "tests/ops/a.py::test_b[triton-1] PASSED [ 1%]\ntests/ops/a.py::test_c[triton] SKIPPED (why) [ 2%]\nrunning"
    assert judge(text, [0], 0) == (True, "passed: 1 passed, 1 skipped")
    assert judge(text, [0], 1) == (True, "not finished: 1 passed, 1 skipped, 1 of 2 processes stopped: time was up")
    verdict = judge(text + "\ntests/ops/a.py::test_d[triton] FAILED [ 3%]\n", [1], 1)
    assert not verdict.is_right
    assert "the first is tests/ops/a.py::test_d[triton]" in verdict.told
    # A process that an illegal access ended writes nothing more
    assert judge(text, [0, -6], 0) == (False, "FAILED: 1 passed, 1 skipped; a process ended with -6")
