"""The lines that a child process prints, until it ends or a time is over; then it is killed, with all it started."""

import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path


class Child:
    def __init__(self, command: Sequence[str], cwd: Path) -> None:
        self._process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, text=True, start_new_session=True)
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.is_late = False

    def lines(self, silence_s: float, deadline: float) -> Iterator[str]:
        """Ends when the child does, when it was silent for `silence_s`, or at `deadline` (of the monotonic clock)."""
        try:
            while (line := self._next(min(silence_s, deadline - time.monotonic()))) is not None:
                yield line.rstrip("\n")
            if not self.is_late:
                self._process.wait()
        finally:
            self._kill()

    @property
    def status(self) -> int | None:
        return self._process.poll()

    def _next(self, patience_s: float) -> str | None:
        try:
            return self._lines.get(timeout=max(0.0, patience_s))
        except queue.Empty:
            self.is_late = True
            return None

    def _kill(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._reader.join()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._lines.put(line)
        self._lines.put(None)
