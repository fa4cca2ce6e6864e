"""`distkv up` as a person runs it: a process of its own, its output, and the processes that it starts."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from openai import OpenAI

from megatron_distkv.config.cluster import ClusterConfig

# A busy machine loads a model slowly.
PATIENCE_S = 600.0
MARK = "DISTKV_TEST_RUN"


class Up:
    """`with Up(config, tmp_path, ...) as up:`; what it leaves behind is ended with it. Files of it lie in `tmp`."""

    def __init__(self, config: ClusterConfig, scratch: Path, tmp: Path, *options: str) -> None:
        file = scratch / f"{uuid.uuid4().hex}.json"
        file.write_text(config.model_copy(update={"start_timeout_s": PATIENCE_S}).model_dump_json())
        self._mark = f"{MARK}={uuid.uuid4().hex}"
        self._output = file.with_suffix(".out")
        name, value = self._mark.split("=")
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "megatron_distkv.cli.main", "up", "--config", str(file), *options],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "TMPDIR": str(tmp), name: value},
            )

    def __enter__(self) -> "Up":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        finally:
            self.kill_all()
            self.process.wait()

    @property
    def output(self) -> str:
        return self._output.read_text(errors="replace")

    def said(self, pattern: str, times: int = 1) -> re.Match[str]:
        """Waits until it has been said so often; returns the last one."""
        wait_until(
            lambda: len(re.findall(pattern, self.output)) >= times or self.process.poll() is not None,
            lambda: f"{pattern!r} was not said: {self.output}",
        )
        found = list(re.finditer(pattern, self.output))
        assert len(found) >= times, self.output
        return found[-1]

    @property
    def base_url(self) -> str:
        return self.said(r"serve .* at (http://\S+/v1)")[1]

    @property
    def log_folder(self) -> Path:
        return Path(self.said(r"logs: (\S+)")[1])

    def complete(self, prompt: list[int], max_tokens: int = 8, **extra: object) -> str:
        with OpenAI(base_url=self.base_url, api_key="none", max_retries=0, timeout=PATIENCE_S) as client:
            answer = client.completions.create(
                model="distkv", prompt=prompt, max_tokens=max_tokens, temperature=0,
                extra_body={"ignore_eos": True, **extra},
            )  # fmt: skip
            return answer.choices[0].text

    def processes(self) -> set[int]:
        """All that it started, however deep: they inherit a mark in their environment, which only the ledger server
        writes over."""
        marked = {int(path.parent.name) for path in Path("/proc").glob("[0-9]*/environ") if _holds(path, self._mark)}
        up = self.process.pid if self.process.poll() is None else None  # a number that it had may be another's by now
        return marked | {int(path.parent.name) for path in Path("/proc").glob("[0-9]*/stat") if _is_of(path, up)}

    def kill_all(self) -> None:
        """kill -9 of itself and of all that it started, before any of them can leave in order."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.kill()

    def kill(self, *words: str) -> None:
        """kill -9 of the one whose command line has these words."""
        (pid,) = {pid for pid in self.processes() if all(word in _command(pid) for word in words)}
        os.kill(pid, signal.SIGKILL)


def wait_until(holds: Callable[[], bool], or_say: Callable[[], str], within_s: float = PATIENCE_S) -> None:
    end_s = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < end_s, or_say()
        time.sleep(0.1)


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def _is_of(stat: Path, parent: int | None) -> bool:
    try:
        state, found, *_ = stat.read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return False  # it has just ended
    return int(found) == parent and state != "Z"


def _holds(environ: Path, mark: str) -> bool:
    try:
        return mark.encode() in environ.read_bytes().split(b"\0")
    except OSError:
        return False  # it has just ended, or is somebody else's
