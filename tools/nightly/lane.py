"""A lane: one command of the nightly run, and how it ended."""

import os
import re
import shlex
import signal
import subprocess
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Lane:
    """`name` is KIND/WHAT or KIND/WHAT/PART: it stays the same from night to night."""

    name: str
    command: list[str]
    timeout_s: float
    needs: str | None = None
    """The lane without which this one cannot run."""

    @property
    def shown_command(self) -> str:
        """Without where this checkout and the environments lie on this machine."""
        return re.sub(r"/\S+/(py3\d+)\b", r"\1", shlex.join(self.command).replace(f"{ROOT}/", ""))


@dataclass
class Outcome:
    """`result`: passed, failed, timed out, or skipped where what it needs has not passed."""

    result: str
    seconds: float = 0.0
    at: str = field(default_factory=lambda: datetime.now(UTC).strftime("%Y-%m-%d %H:%M"))
    """UTC"""
    last_words: str = ""

    @property
    def has_passed(self) -> bool:
        return self.result == "passed"


def run_lane(lane: Lane, log: Path) -> Outcome:
    """In a session of its own, which is ended as a whole when its time is over; output goes to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    start_s = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            lane.command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            result = "passed" if process.wait(lane.timeout_s) == 0 else "failed"
        except subprocess.TimeoutExpired:
            result = "timed out"
        finally:
            _end(process)
    return Outcome(result, round(time.monotonic() - start_s), last_words=_last_words(log))


def _end(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _last_words(log: Path) -> str:
    lines = [line.strip(" =") for line in log.read_text(errors="replace").splitlines() if line.strip(" =")]
    return lines[-1][:120] if lines else ""
