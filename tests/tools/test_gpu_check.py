"""The GPU check must run whole the first time that a GPU is at hand: so it goes its whole way here, interpreted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
CHECK = Path(__file__).resolve().parents[2] / "tools/gpu_check.py"

# What this package needs and a machine that only has torch, Triton and pytest lacks.
LACKING = """
import sys

LACKED = ("msgspec", "pydantic", "redis", "megatron", "deepspeed", "starlette", "transformers")

class Lacking:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in LACKED:
            raise ImportError(f"{name} is not here")

sys.meta_path.insert(0, Lacking())
"""


@pytest.mark.nightly
def test_a_dry_run_checks_and_reports_every_kernel(tmp_path: Path) -> None:
    # Given a folder that is not the checkout, on a machine where nothing is installed
    site, out = tmp_path / "site", tmp_path / "out"
    site.mkdir()
    (site / "sitecustomize.py").write_text(LACKING)
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-W", "ignore", str(CHECK), "--dry-run", "--out", str(out)]

    # When the check runs dry
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=280)

    # Then conformance was run, and every kernel has its row, in the order of what matters
    assert result.returncode == 0, result.stdout + result.stderr
    assert "conformance of ours: passed" in result.stdout
    assert "conformance of flash_attn: passed" in result.stdout
    found = json.loads((out / "gpu_check.json").read_text())
    assert [row["work"].split(",")[0] for row in found["figures"]] == [
        "decode", "prefill", "int8 decode", "decode from a CUDA graph", "backward", "merge of 8 partials",
        "gather for migration", "store_kv",
    ]  # fmt: skip
    assert found["faults"] == found["not_run"] == []
    assert sorted(path.name for path in out.iterdir()) == ["gpu_check.json", "gpu_check.md"]
    assert "| decode" in (out / "gpu_check.md").read_text()


def test_time_that_is_up_leaves_a_report(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", str(CHECK), "--dry-run", "--minutes", "0", "--out", str(tmp_path)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Not run: conformance of ours." in (tmp_path / "gpu_check.md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, str(CHECK)], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 2
    assert "no GPU here" in result.stderr
