"""Children that never outlive their parent: each in a session of its own, ended as a whole."""

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_distkv.launch.cause import cause_of

_PR_SET_PDEATHSIG = 1
# A child that has not ended on SIGTERM within this time is killed. A member that leaves may wait for an answer as long
# as it waits for a creditor's: lending.deadline_s, 10 s.
GRACE_S = 30.0
# The end of an output, in which the cause of a process's end is looked for.
_LAST_BYTES = 1 << 18


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
        """Why it ended: see `cause_of`."""
        with self.log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _LAST_BYTES))
            output = file.read().decode(errors="replace")
        return cause_of(output, self.process.poll() or 0)

    def line_after(self, prefix: str) -> str | None:
        """The rest of the first line of its output that has `prefix` in it."""
        for line in self.log.read_text(errors="replace").splitlines():
            if prefix in line:
                return line.partition(prefix)[2].strip()
        return None

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def end(self, grace_s: float = GRACE_S) -> None:
        """Wait for its end and that of all it started; kill what is left after the grace period.

        deepspeed's launcher ends on SIGTERM at once, before its ranks have left in order.
        """
        deadline = time.monotonic() + grace_s
        while self.is_running and time.monotonic() < deadline:
            time.sleep(0.02)
        while _group_lives(self.process.pid) and time.monotonic() < deadline:
            time.sleep(0.1)
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


def _group_lives(group: int) -> bool:
    """Whether any process of it runs; one that has ended, and that nobody has waited for, does not."""
    return any(_runs_in(stat, group) for stat in Path("/proc").glob("[0-9]*/stat"))


def _runs_in(stat: Path, group: int) -> bool:
    try:
        state, _, found, *_ = stat.read_text().rpartition(")")[2].split()  # after the name, which may hold anything
    except (OSError, ValueError):
        return False  # it has just ended
    return int(found) == group and state not in "ZX"


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
