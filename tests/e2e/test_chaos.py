"""A pool whose parts are killed, hung and restarted at random, for a short while."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SEED, MINUTES = 20, "1"  # of traffic and faults; times still differ between runs


@pytest.mark.timeout(500)
def test_a_while_of_chaos_loses_and_leaks_nothing(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    options = ["--minutes", MINUTES, "--seed", str(SEED), "--json", str(file)]
    command = [sys.executable, "-m", "tools.bench.chaos", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert file.exists(), done.stderr[-3000:]
    report = json.loads(file.read_text())
    assert (report["lost"], report["mismatches"], report["leaks"]) == (0, 0, []), report
    assert report["requests"] > 10
    assert len(report["faults"]) >= 4
    assert "| 20 | 1 |" in done.stdout
    assert done.returncode == 0
