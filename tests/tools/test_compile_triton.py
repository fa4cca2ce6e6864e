"""What Triton's compiler makes of the kernels for Hopper, seen without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
# Every kernel, and attention in the shapes that are launched most; the rest is for who changes them.
CHECKED = "decode$|decode, int8|prefill$|prefill, (int8|window)|merge|store|rope|backward"


@pytest.mark.nightly
def test_no_kernel_spills_and_attention_loads_ahead(tmp_path: Path) -> None:
    # Given a compiler of its own process: this one's Triton interprets
    env = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-W", "ignore", "-m", "tools.compile_triton", "--only", CHECKED]

    # When they are compiled for sm_90
    result = subprocess.run(
        [*command, "--json", str(tmp_path / "built.json")], env=env, capture_output=True, text=True, timeout=250
    )

    # Then none spills, attention has two copies in flight and room beside it, and prefill is on Hopper's tensor cores
    assert result.returncode == 0, result.stderr
    built = {row["kernel"]: row for row in json.loads((tmp_path / "built.json").read_text())}
    assert all(row["spilled_bytes"] == 0 for row in built.values())
    for decode in ("decode", "decode, int8"):
        assert built[decode]["copies_in_flight"] >= 2
        assert built[decode]["per_sm"] >= 2
        assert built[decode]["tensor_core"] == "mma.sync"
    for prefill in ("prefill", "prefill, int8", "prefill, window"):
        assert built[prefill]["tensor_core"] == "wgmma"
