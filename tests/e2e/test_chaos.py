"""One minute of a pool whose parts are killed, hung and restarted at random."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SEED = 20  # of traffic and faults; times still differ between runs


@pytest.mark.timeout(500)
def test_a_minute_of_chaos_loses_and_leaks_nothing(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    command = [sys.executable, "-m", "tools.bench.chaos", "--minutes", "1", "--seed", str(SEED), "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert file.exists(), done.stderr[-3000:]
    report = json.loads(file.read_text())
    assert (report["lost"], report["mismatches"], report["leaks"]) == (0, 0, []), report
    assert report["requests"] > 20
    assert len(report["faults"]) >= 3
    assert done.returncode == 0
