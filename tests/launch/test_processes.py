"""Children end as a whole, and in order where they can."""

import sys
import time
from pathlib import Path

from megatron_distkv.launch.processes import Child

# On SIGTERM a launcher ends at once; what it has started takes its time, and writes that it ended in order.
LAUNCHER = """
import subprocess, sys, time
rank = '''
import pathlib, signal, sys, time
def leave(*_):
    time.sleep(1)
    pathlib.Path(sys.argv[1]).write_text("in order")
    sys.exit(0)
signal.signal(signal.SIGTERM, leave)
print("READY rank", flush=True)
time.sleep(3600)
'''
subprocess.Popen([sys.executable, "-c", rank, sys.argv[1]])
time.sleep(3600)
"""


def test_what_a_launcher_has_started_may_leave_in_order(tmp_path: Path) -> None:
    child = Child("one", [sys.executable, "-c", LAUNCHER, str(tmp_path / "left")], tmp_path / "log")
    while child.ready_line() is None:
        assert child.is_running
        time.sleep(0.05)
    child.terminate()
    child.end(grace_s=30)
    assert (tmp_path / "left").read_text() == "in order"


def test_what_does_not_leave_is_killed(tmp_path: Path) -> None:
    stubborn = LAUNCHER.replace("time.sleep(1)", "time.sleep(3600)")
    child = Child("one", [sys.executable, "-c", stubborn, str(tmp_path / "left")], tmp_path / "log")
    while child.ready_line() is None:
        assert child.is_running
        time.sleep(0.05)
    child.terminate()
    began_s = time.monotonic()
    child.end(grace_s=1)
    assert time.monotonic() - began_s < 30
    assert not (tmp_path / "left").exists()
