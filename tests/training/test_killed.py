"""kill -9 in mid-save: the checkpoint before stays usable, and the run goes on from it to the same losses."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from megatron_distkv.launch.commands import free_port

from megatron_distkv.config.train import TrainConfig
from megatron_distkv.model import find_checkpoint
from tests.training.jobs import board_of
from tests.training.test_deepspeed import VALUES

SCRIPT = Path(__file__).with_name("killed_training.py")
STEPS = 10


Train = Callable[..., int]


@pytest.fixture
def train(tmp_path: Path) -> Iterator[Train]:
    """Runs to its end, or to its death; returns the exit status."""
    with (tmp_path / "log").open("w+") as log:
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None

        def run(config: Path, output: Path, *, resume: bool, save: int = 0, operation: int = 0) -> int:
            process.stdin.write(json.dumps([str(config), str(output), resume, save, operation, free_port()]) + "\n")
            process.stdin.flush()
            status = int(process.stdout.readline())
            assert status in (0, -signal.SIGKILL), Path(log.name).read_text()[-3000:]
            return status

        yield run
        process.stdin.close()
        process.stdout.close()
        assert process.wait(30) == 0


def saved_steps(output: Path) -> tuple[int | None, list[int]]:
    """(the step that is named the latest, all that have a name)"""
    return find_checkpoint(output).step, sorted(int(path.name[5:]) for path in output.glob("iter_*"))


def test_a_run_that_is_killed_in_mid_save_ends_as_one_that_was_not(train: Train, tmp_path: Path) -> None:
    # Given a run that saves every second step, and what each save does to the disk
    values = {**VALUES, "steps": STEPS, "save_every": 2, "evaluate_every": 100, "zero_stage": 2}
    config = tmp_path / "train.json"
    config.write_text(TrainConfig.model_validate(values).model_dump_json())
    assert train(config, tmp_path / "whole", resume=False) == 0
    losses = json.loads((tmp_path / "whole" / "losses.json").read_text())
    (operations,) = set(json.loads((tmp_path / "whole" / "operations.json").read_text()))
    assert len(losses) == STEPS
    assert operations > 10
    # When it is killed while its second save writes tensors
    output = tmp_path / "killed"
    assert train(config, output, resume=False, save=2, operation=1) == -signal.SIGKILL
    assert saved_steps(output) == (2, [2])
    # And when, gone on, it is killed as a save is about to be named the latest
    assert train(config, output, resume=True, save=2, operation=operations - 1) == -signal.SIGKILL
    assert saved_steps(output) == (4, [2, 4, 6])
    # Then it goes on from what is named, to the same end, to the last bit
    assert train(config, output, resume=True) == 0
    assert json.loads((output / "losses.json").read_text()) == losses[4:]
    log = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in log] == losses
    # And TensorBoard shows each step once, though some were taken twice
    shown = board_of(output)
    assert {"loss", "learning_rate", "gradient_norm", "tokens_per_s", "mfu"} <= shown.keys()
    assert shown["loss"] == [(step, pytest.approx(loss)) for step, loss in enumerate(losses, 1)]
    # And nothing of the saves in between stays
    assert saved_steps(output) == (10, [8, 10])
    assert not (output / ".saving").exists()
