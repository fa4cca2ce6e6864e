"""What a process finds before it has done anything: ranks, and imports that would cost it time."""

import json
import subprocess
import sys

import pytest

SCRIPT = """
import json, sys, warnings
warnings.filterwarnings("ignore")
import torch
compiler = torch.compile
from megatron_distkv.model import init_tensor_parallel
# torch's own name for its compiler: what is asked is whether that was imported
found = {"compiler_is_imported": "torch._dynamo" in sys.modules, "compile_is_torchs": torch.compile is compiler}
try:
    init_tensor_parallel(1, 2)
except Exception as error:
    found["error"] = str(error)
init_tensor_parallel(1)
from pathlib import Path
threads = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
found["gloo_loops"] = sum("gloo_tcp" in name for name in threads)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found() -> dict[str, object]:
    """By one process that no launcher started."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    read: dict[str, object] = json.loads(done.stdout)
    return read


def test_ranks_that_the_launcher_did_not_start_are_missed(found: dict[str, object]) -> None:
    assert "tensor_parallel 1 x context_parallel 2 does not divide the 1 processes" in str(found["error"])


def test_the_model_comes_without_a_compiler_and_leaves_torchs_in_place(found: dict[str, object]) -> None:
    assert (found["compiler_is_imported"], found["compile_is_torchs"]) == (False, True)


def test_groups_of_the_same_ranks_are_one_group(found: dict[str, object]) -> None:
    """Each has a thread that never sleeps for long."""
    assert found["gloo_loops"] <= 3  # of more than twenty groups
