"""Children that never outlive their parent: each in a session of its own, ended as a whole."""

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

_PR_SET_PDEATHSIG = 1
# A child that has not ended on SIGTERM within this time is killed.
GRACE_S = 10.0


class Child:
    """A process and all it starts. Its output goes to `log`; `READY` lines in it say that it serves."""

    def __init__(self, name: str, command: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> None:
        self.name = name
        self.command = command
        self.log = log
        self.env = env
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {})},
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    def ready_line(self) -> str | None:
        """What follows READY in its output, once it is there."""
        return self.line_after("READY ")

    def error_line(self) -> str:
        """The sentence that it ended with, or the last line of its output."""
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return self.line_after("ERROR ") or (lines[-1] if lines else "no output")

    def line_after(self, prefix: str) -> str | None:
        """The rest of the first line of its output that has `prefix` in it."""
        for line in self.log.read_text(errors="replace").splitlines():
            if prefix in line:
                return line.partition(prefix)[2].strip()
        return None

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def end(self) -> None:
        """Wait for its end; after the grace period kill it and all it started."""
        deadline = time.monotonic() + GRACE_S
        while self.is_running and time.monotonic() < deadline:
            time.sleep(0.02)
        self._signal(signal.SIGKILL)
        self.process.wait()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


def run_until_end(command: Sequence[str]) -> int:
    """Run in the foreground; SIGINT and SIGTERM reach the whole group of the child, once."""
    process = subprocess.Popen(command, start_new_session=True, preexec_fn=_die_with_parent)

    def forward(number: int, _: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM if number == signal.SIGINT else number)

    old = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return process.wait()
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
