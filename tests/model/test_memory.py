"""Nothing holds the model twice: loading takes the model's own memory, converting a file's or a tensor's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.model.families import save_family

SCRIPT = Path(__file__).with_name("run_memory.py")


def share(what: str, source: Path, target: Path) -> float:
    """Peak of memory over the size of the weights."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    command = [sys.executable, str(SCRIPT), what, str(source), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return float(done.stdout)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """100 MB."""
    folder = tmp_path_factory.mktemp("memory")
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_key_value_heads": 4}
    return {"hf": save_family("llama", folder / "hf", **sizes), "folder": folder}


def test_converting_holds_a_part_and_loading_holds_the_model_once(checkpoints: dict[str, Path]) -> None:
    folder, hf = checkpoints["folder"], checkpoints["hf"]
    converted = {
        "hf to torch_dist": share("torch_dist", hf, folder / "dist"),
        "torch_dist to legacy of four": share("legacy", folder / "dist", folder / "legacy"),
        "legacy to hf": share("hf", folder / "legacy", folder / "back"),
    }
    loaded = {"hf": share("load", hf, folder), "torch_dist": share("load", folder / "dist", folder)}
    # A rank's quarter, or a file, and a few tensors; the model and a few tensors.
    print(converted, loaded)
    assert all(value < 0.6 for value in converted.values()), converted
    assert all(value < 1.3 for value in loaded.values()), loaded
