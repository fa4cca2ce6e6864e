"""Training jobs for the real deepspeed launcher: those of as many ranks run one after the other in one launch."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from megatron_distkv.launch.commands import deepspeed
from megatron_distkv.launch.processes import Child

SCRIPT = Path(__file__).with_name("run_training.py")


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

    def as_json(self) -> dict[str, Any]:
        degrees = {"tensor_parallel": self.layout.tensor, "context_parallel": self.layout.context}
        config = {**self.values, **degrees, "zero_stage": self.zero_stage}
        return {
            "config": config,
            "output": str(self.output),
            "resume_from": self.resume_from and str(self.resume_from),
        }

    def seen(self) -> dict[str, Any]:
        seen: dict[str, Any] = json.loads((self.output / "seen.json").read_text())
        return seen

    def log(self) -> list[dict[str, float]]:
        return [json.loads(line) for line in (self.output / "log.jsonl").read_text().splitlines()]


def launch(jobs: list[Job], directory: Path) -> None:
    num_ranks = math.prod(jobs[0].layout)
    assert all(math.prod(job.layout) == num_ranks for job in jobs)
    file, log = directory / f"jobs-{num_ranks}.json", directory / f"log-{num_ranks}"
    file.write_text(json.dumps([job.as_json() for job in jobs]))
    child = Child("training", [*deepspeed(num_ranks), str(SCRIPT), str(file)], log, {"OMP_NUM_THREADS": "1"})
    try:
        assert child.process.wait(timeout=280) == 0, log.read_text(errors="replace")[-4000:]
    finally:
        child.end()
