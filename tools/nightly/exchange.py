"""A run that changes its Python twice: trained here, gone on with there, and here again.

usage: python -m tools.nightly.exchange OTHER_PYTHON
Weights, AdamW's states and batches must be those of a run that stayed: its losses are compared.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from tools.nightly.lane import ROOT
from tools.wheel_check import TRAINING

# Kernels of two builds of torch may round differently.
LOSS_TOLERANCE = 1e-4
STEPS_EACH = 2


def main() -> int:
    here, other = sys.executable, sys.argv[1]
    with tempfile.TemporaryDirectory(prefix="distkv-exchange-") as folder:
        stayed = losses(train(Path(folder) / "stayed", [here], steps_each=3 * STEPS_EACH))
        moved = losses(train(Path(folder) / "moved", [here, other, here]))
    print(f"stayed: {stayed}\nmoved:  {moved}")
    difference = max(abs(a - b) for a, b in zip(stayed, moved, strict=True))
    print(f"{len(moved)} steps, losses differ by {difference:.1e}")
    return 0 if difference < LOSS_TOLERANCE else 1


def train(output: Path, pythons: list[str], steps_each: int = STEPS_EACH) -> Path:
    """One run, so many steps on each of the pythons."""
    for number, python in enumerate(pythons):
        config = output.with_suffix(f".{number}.json")
        steps = steps_each * len(pythons)
        total = {**TRAINING, "steps": steps, "save_every": steps_each, "keep_checkpoints": steps}
        config.write_text(json.dumps(total))
        _train_until(python, config, output, (number + 1) * steps_each, resume=number > 0)
    return output


def _train_until(python: str, config: Path, output: Path, step: int, *, resume: bool) -> None:
    """The schedule is that of the whole run; what was trained beyond `step` is given up."""
    command = [python, "-m", "megatron_distkv.cli.main", "train", "--config", str(config), "--output", str(output)]
    subprocess.run([*command, "--ranks", "1", *(["--resume"] if resume else [])], cwd=ROOT, check=True)
    latest = output / "latest_checkpointed_iteration.txt"
    latest.write_text(str(step))


def losses(output: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output / "log.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    sys.exit(main())
