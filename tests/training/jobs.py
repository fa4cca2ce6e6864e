"""Training jobs, all in one launch: those of as many ranks run one after the other, then those of more."""

import json
import math
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from megatron_distkv.launch.commands import deepspeed, free_port
from megatron_distkv.launch.processes import Child

SCRIPT = Path(__file__).with_name("run_training.py")
ROOT = Path(__file__).parents[2]
LAUNCH_TIMEOUT_S = 550


class Layout(NamedTuple):
    tensor: int = 1
    context: int = 1
    data: int = 1

    def __str__(self) -> str:
        return f"tp{self.tensor}-cp{self.context}-dp{self.data}"


@dataclass(frozen=True)
class Job:
    layout: Layout
    zero_stage: int
    output: Path
    values: dict[str, Any] = field(repr=False)
    resume_from: Path | None = None
    is_attention: bool = False
    """Not a run: one attention layer, forward and backward."""

    def as_json(self) -> dict[str, Any]:
        degrees = {"tensor_parallel": self.layout.tensor, "context_parallel": self.layout.context}
        config = {**self.values, **degrees, "zero_stage": self.zero_stage}
        return {
            "config": config,
            "output": str(self.output),
            "resume_from": self.resume_from and str(self.resume_from),
            "is_attention": self.is_attention,
        }

    def seen(self) -> dict[str, Any]:
        seen: dict[str, Any] = json.loads((self.output / "seen.json").read_text())
        return seen

    def log(self) -> list[dict[str, float]]:
        return [json.loads(line) for line in (self.output / "log.jsonl").read_text().splitlines()]


def launch(jobs: list[Job], directory: Path, *, deepspeed_ranks: int | None = None) -> None:
    """Jobs are kept in order among those of as many ranks; with `deepspeed_ranks` the real launcher starts it all."""
    groups = [
        {"ranks": ranks, "port": free_port(), "jobs": [job.as_json() for job in jobs if math.prod(job.layout) == ranks]}
        for ranks in sorted({math.prod(job.layout) for job in jobs})
    ]
    file, log = directory / "jobs.json", directory / "log"
    file.write_text(json.dumps(groups))
    launcher = [sys.executable] if deepspeed_ranks is None else deepspeed(deepspeed_ranks)
    env = {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    child = Child("training", [*launcher, str(SCRIPT), str(file)], log, env)
    try:
        assert child.process.wait(timeout=LAUNCH_TIMEOUT_S) == 0, log.read_text(errors="replace")[-4000:]
    finally:
        child.end()


def board_of(output: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard itself reads in a run's events: (step, value) of each figure."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(output / "tensorboard")).Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
