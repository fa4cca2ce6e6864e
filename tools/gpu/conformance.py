"""The conformance suite on a GPU, one backend at a time, its tests shared among processes.

A kernel's compilation takes seconds of one core, and there are hundreds; and an illegal access on a GPU ends a process,
but not those beside it. What a process wrote before time was up counts.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
SUITE = ("test_conformance", "test_int8_kv", "test_micro_attention", "test_tile_backward")
MOST_SHARDS, POLL_S = 12, 0.2
VERDICT = re.compile(r"^(\S+::.*) (PASSED|FAILED|ERROR|SKIPPED)\b", re.MULTILINE)


class Verdict(NamedTuple):
    is_right: bool  # as far as it came
    told: str


def conformance(backend: str, tests: str, out: Path, deadline: float) -> Verdict:
    """`tests`: pytest's expression for those of the backend; `deadline` of the monotonic clock. Logs go to `out`."""
    began, count = time.monotonic(), max(1, min(MOST_SHARDS, (os.cpu_count() or 1) * 3 // 4))
    logs = [out / f"gpu_check_{backend}_{shard}.log" for shard in range(count)]
    shards = [_start(tests, f"{shard}/{count}", log) for shard, log in enumerate(logs)]
    late: list[subprocess.Popen[bytes]] = []
    try:
        while any(shard.poll() is None for shard in shards) and time.monotonic() < deadline:
            time.sleep(POLL_S)
    finally:
        late += [shard for shard in shards if shard.poll() is None]
        for shard in late:
            os.killpg(shard.pid, signal.SIGKILL)
            shard.wait()
    text = "\n".join(log.read_text(errors="replace") for log in logs)
    verdict = judge(text, [shard.returncode for shard in shards if shard not in late], len(late))
    if verdict.is_right:
        for log in logs:
            log.unlink()
    return verdict._replace(told=f"{verdict.told}, {time.monotonic() - began:.0f} s")


def judge(text: str, statuses: list[int], num_late: int) -> Verdict:
    """From what the processes wrote, how those that ended did, and how many were stopped because time was up."""
    results = VERDICT.findall(text)
    counts = Counter(result.lower() for _, result in results)
    told = ", ".join(f"{count} {result}" for result, count in sorted(counts.items())) or "no test ran"
    if num_late:
        told += f", {num_late} of {num_late + len(statuses)} processes stopped: time was up"
    wrong = [name for name, result in results if result in ("FAILED", "ERROR")]
    if wrong or any(statuses):
        first = f"the first is {wrong[0]}" if wrong else f"a process ended with {max(statuses, key=abs)}"
        return Verdict(False, f"FAILED: {told}; {first}")
    return Verdict(True, f"{'not finished' if num_late else 'passed'}: {told}")


def _start(tests: str, shard: str, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "tools.kernels_only", "-p", "tools.gpu.shard"]
    command += ["-p", "no:cacheprovider", "--confcutdir", "tests/ops", "--shard", shard, "-k", tests]
    command += [f"tests/ops/{name}.py" for name in SUITE]
    with log.open("wb") as file:
        return subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
