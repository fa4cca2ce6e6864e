"""kill -9 in mid-save: the checkpoint before stays usable, and the run goes on from it to the same losses.

And what a stranger has put into a checkpoint does not run when a run goes on from it.
"""

import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from megatron_distkv.launch.commands import free_port

from megatron_distkv.config.train import TrainConfig
from megatron_distkv.model import find_checkpoint
from megatron_distkv.model.weights.safe_load import load_index
from megatron_distkv.training.passkey import load_prose
from tests.model.test_damaged import Bomb
from tests.training.jobs import board_of
from tests.training.test_deepspeed import VALUES

SCRIPT = Path(__file__).with_name("killed_training.py")
STEPS = 10


class Runs:
    """Training runs of one configuration, each a process."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "log"
        self._config = folder / "train.json"
        values = {**VALUES, "steps": STEPS, "save_every": 2, "evaluate_every": 100, "zero_stage": 2}
        self._train = TrainConfig.model_validate(values)
        self._config.write_text(self._train.model_dump_json())
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(SCRIPT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()},
            )  # fmt: skip

    def run_on(self, text: Path, output: Path) -> int:
        """Goes on in `output`, but with this text; returns the exit status."""
        config = text.with_name(f"{text.name}.json")
        config.write_text(self._train.with_text(text).model_dump_json())
        return self._run(config, output, resume=True)

    def run(self, output: Path, *, resume: bool, save: int = 0, operation: int = 0) -> int:
        """To its end, or its death; returns the exit status."""
        return self._run(self._config, output, resume=resume, save=save, operation=operation)

    def _run(self, config: Path, output: Path, *, resume: bool, save: int = 0, operation: int = 0) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        arguments = [str(config), str(output), resume, save, operation, free_port()]
        self._process.stdin.write(json.dumps(arguments) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate(timeout=30)
        assert self._process.returncode == 0


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    started = Runs(tmp_path_factory.mktemp("runs"))
    yield started
    started.close()


@pytest.fixture(scope="module")
def whole(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbed, and that saved every second step."""
    output = tmp_path_factory.mktemp("whole")
    assert runs.run(output, resume=False) == 0, runs.log.read_text()[-3000:]
    return output


def saved_steps(output: Path) -> tuple[int | None, list[int]]:
    """(the step that is named the latest, all that have a name)"""
    return find_checkpoint(output).step, sorted(int(path.name[5:]) for path in output.glob("iter_*"))


def test_a_run_that_is_killed_in_mid_save_ends_as_one_that_was_not(runs: Runs, whole: Path, tmp_path: Path) -> None:
    # Given what each save does to the disk
    losses = json.loads((whole / "losses.json").read_text())
    (operations,) = set(json.loads((whole / "operations.json").read_text()))
    assert len(losses) == STEPS
    assert operations > 10
    # When a run is killed while its second save writes tensors
    output = tmp_path / "killed"
    assert runs.run(output, resume=False, save=2, operation=1) == -signal.SIGKILL
    assert saved_steps(output) == (2, [2])
    # And when, gone on, it is killed as a save is about to be named the latest
    assert runs.run(output, resume=True, save=2, operation=operations - 1) == -signal.SIGKILL
    assert saved_steps(output) == (4, [2, 4, 6])
    # Then it goes on from what is named, to the same end, to the last bit
    assert runs.run(output, resume=True) == 0
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


def test_a_run_goes_on_with_its_own_text_only(runs: Runs, whole: Path, tmp_path: Path) -> None:
    # Given a run on the built-in text, and the same text in a file
    output, text = tmp_path / "run", tmp_path / "text"
    shutil.copytree(whole, output)
    built_in = load_prose(None)
    text.write_bytes(built_in.training.tobytes() + built_in.held_out.tobytes())
    # Then it goes on with that
    assert runs.run_on(text, output) == 0, runs.log.read_text()[-3000:]
    # But not when one letter is another, and nothing has changed
    text.write_bytes(text.read_bytes().replace(b"statement", b"Statement", 1))
    before = sorted(output.rglob("*"))
    assert runs.run_on(text, output) == 1
    assert f"CheckpointError: {find_checkpoint(output).directory} was trained on another text" in runs.log.read_text()
    assert sorted(output.rglob("*")) == before


def hostile_index(directory: Path, bomb: Bomb) -> str:
    index = load_index(directory / ".metadata")
    index.planner_data = bomb
    (directory / ".metadata").write_bytes(pickle.dumps(index))
    return ".metadata is not loaded"


def hostile_optimizer_state(directory: Path, bomb: Bomb) -> str:
    index = load_index(directory / ".metadata")
    key = next(key for key in index.storage_data if key.fqn.startswith("optimizer.state.exp_avg."))
    place, piece = index.storage_data[key], io.BytesIO()
    torch.save(bomb, piece)
    file = directory / place.relative_path
    place.offset, place.length = file.stat().st_size, len(piece.getvalue())
    file.write_bytes(file.read_bytes() + piece.getvalue())
    (directory / ".metadata").write_bytes(pickle.dumps(index))
    return f"CheckpointError: {directory}: cannot read the optimizer's exp_avg: "


@pytest.mark.parametrize("make_hostile", [hostile_index, hostile_optimizer_state])
def test_a_hostile_checkpoint_is_not_gone_on_from(
    make_hostile: Callable[[Path, Bomb], str], runs: Runs, whole: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    sentence = make_hostile(find_checkpoint(output).directory, Bomb(tmp_path / "mark"))
    assert runs.run(output, resume=True) == 1
    assert sentence in runs.log.read_text()
    assert not (tmp_path / "mark").exists()
