"""Without a C++ compiler the package still installs, and says so."""

import os
import subprocess
import sys
from pathlib import Path

from megatron_distkv.kernels.cpu.library import load_library

ROOT = Path(__file__).parents[2]


def test_no_compiler_is_a_warning_and_no_library(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "build_ext", f"--build-lib={tmp_path}", f"--build-temp={tmp_path / 'temp'}"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"CXX": "/no/such/compiler"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "torch's reference kernels will serve" in done.stdout + done.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_a_missing_library_is_no_error(tmp_path: Path) -> None:
    assert load_library(tmp_path / "libdistkv_cpu.so") is None
