"""What Triton's compiler makes of the kernels for Hopper, seen without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")


def test_no_kernel_spills_and_attention_loads_ahead(tmp_path: Path) -> None:
    # Given a compiler of its own process: this one's Triton interprets
    env = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-W", "ignore", "-m", "tools.compile_triton", "--json", str(tmp_path / "built.json")]

    # When all kernels are compiled for sm_90
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=250)

    # Then none spills, attention has two copies in flight, and prefill is on Hopper's own tensor cores
    assert result.returncode == 0, result.stderr
    built = {row["kernel"]: row for row in json.loads((tmp_path / "built.json").read_text())}
    assert all(row["spilled_bytes"] == 0 for row in built.values())
    assert built["decode, group 4"]["copies_in_flight"] >= 2
    assert built["prefill, causal"]["tensor_core"] == "wgmma"
