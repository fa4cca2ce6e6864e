"""Nothing holds the model twice: loading takes the model's own memory, converting a file's or a tensor's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.model.families import save_family
from tests.model.zero3 import save_zero3

SCRIPT = Path(__file__).with_name("run_memory.py")


def shares(*tasks: str) -> list[float]:
    """Each task's peak of memory over the size of the weights."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd(), "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, str(SCRIPT), *tasks], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[float] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """100 MB."""
    folder = tmp_path_factory.mktemp("memory")
    sizes = {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 24,
        "num_key_value_heads": 4,
        "vocab_size": 132,
    }
    hf = save_family("llama", folder / "hf", **sizes)
    return {"hf": hf, "zero3": save_zero3(folder / "zero3", hf), "folder": folder}


def test_converting_holds_a_part_and_loading_holds_the_model_once(checkpoints: dict[str, Path]) -> None:
    folder, hf, zero3 = (checkpoints[name] for name in ("folder", "hf", "zero3"))
    conversions = [
        f"torch_dist:{hf}:{folder / 'dist'}",
        f"legacy:{folder / 'dist'}:{folder / 'legacy'}",
        f"hf:{folder / 'legacy'}:{folder / 'back'}",
    ]
    parts = [f"part:{path}:" for path in (hf, folder / "dist", folder / "legacy", zero3)]
    found = shares(*conversions, *parts, f"load:{hf}:")
    print(found)
    # A rank's quarter, or a file, and a few tensors; what the rank keeps, and a few tensors.
    assert max(found[:3]) < 0.6, found
    assert min(found[3:]) > 0.9, found
    assert max(found[3:]) < 1.2, found
