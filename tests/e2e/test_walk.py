"""The walk of docs/training.md, command by command, only smaller: train, convert, verify, serve, evaluate."""

import json
import os
import re
import shlex
import subprocess
import time
from pathlib import Path

import pytest
from megatron_distkv.launch.commands import command_line
from megatron_distkv.launch.processes import Child

from megatron_distkv.config.base import load_config
from megatron_distkv.config.train import TrainConfig

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "training.md"
HEADING = "## Passkeys"
ENV = {"OMP_NUM_THREADS": "1"}
READY_WITHIN_S = 600
# Of one command: on a busy machine the imports of two ranks alone may take minutes.
RUN_WITHIN_S = 900


def commands(**smaller: str) -> list[list[str]]:
    """The block below the heading; every text in `smaller` must be there to be replaced."""
    block = PAGE.read_text().split(HEADING, 1)[1].split("```")[1]
    for text, other in smaller.items():
        assert text in block, f"the walk does not say {text!r} any more"
        block = block.replace(text, other)
    lines = [shlex.split(line) for line in block.strip().splitlines()]
    assert [line[:2] for line in lines] == [["distkv", name] for name in ("train", "convert", "verify", "up", "eval")]
    return [command_line(*line[1:]) for line in lines]


def run(command: list[str]) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **ENV}, timeout=RUN_WITHIN_S, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.timeout(4 * RUN_WITHIN_S + READY_WITHIN_S)
def test_the_walk_of_the_training_page(tmp_path: Path) -> None:
    # Given the walk's configuration with fewer steps, and its commands with fewer instances and shorter contexts
    config = load_config(TrainConfig, ROOT / "configs" / "train" / "passkey.yaml").model_dump(mode="json")
    (tmp_path / "small.json").write_text(json.dumps({**config, "steps": 3, "evaluation_length": 64}))
    train, convert, verify, up, evaluate = commands(
        **{
            "configs/train/passkey.yaml": str(tmp_path / "small.json"),
            "runs/": f"{tmp_path}/",
            "--instances 3": "--instances 1 --launcher python --port 0",
            "--lengths 512,2048 --depths 0.1,0.5,0.9": f"--lengths 80,200 --depths 0.5 --json {tmp_path / 'eval.json'}",
        }
    )
    # Then training on two ranks leaves a log and a checkpoint, which others read as we do
    run(train)
    assert len((tmp_path / "passkey" / "log.jsonl").read_text().splitlines()) == 3
    assert "legacy" in run(convert)
    assert "the same within 0.0001" in run(verify)
    # And a pool serves it, and answers the evaluation
    pool = Child("up", up, tmp_path / "up.log", ENV)
    try:
        evaluate[evaluate.index("--base-url") + 1] = base_url(pool)
        assert "80 tokens  recall" in run(evaluate)
        assert re.search(r"serve torch_dist checkpoint \S+ \(.*step 3\) at", pool.log.read_text())
    finally:
        pool.terminate()
        pool.end()
    assert len(json.loads((tmp_path / "eval.json").read_text())) == 2


def base_url(pool: Child) -> str:
    deadline = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < deadline and pool.is_running:
        words = pool.log.read_text(errors="replace").split()
        if "at" in words:
            return words[words.index("at") + 1]
        time.sleep(0.2)
    raise AssertionError(pool.log.read_text(errors="replace")[-2000:])
