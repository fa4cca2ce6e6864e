"""Run by test_killed.py: one rank of training that kills itself, as by kill -9, in the middle of a save.

usage: killed_training.py CONFIG OUTPUT RESUME SAVE OPERATION: at the OPERATION-th write to the disk (fsync, rename,
replace, exchange) of its SAVE-th save; 0: never.
"""

import json
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")
os.environ["DS_ACCELERATOR"] = "cpu"

from megatron_distkv.config.train import TrainConfig  # noqa: E402
from megatron_distkv.training import checkpoint, train  # noqa: E402


def main(config: str, output: str, resume: str, save: str, operation: str) -> None:
    killer = Killer(int(save), int(operation))
    train.save_run = killer.counting_saves(train.save_run)  # type: ignore[attr-defined]
    for place, name in ((os, "fsync"), (os, "rename"), (os, "replace"), (checkpoint, "_exchange")):
        setattr(place, name, killer.counting(getattr(place, name)))
    losses = train.Trainer(
        TrainConfig.model_validate_json(Path(config).read_text()), Path(output), resume=resume == "1"
    ).run()
    (Path(output) / "losses.json").write_text(json.dumps(losses))
    (Path(output) / "operations.json").write_text(json.dumps(killer.operations))


class Killer:
    def __init__(self, save: int, operation: int) -> None:
        self._save, self._operation = save, operation
        self.operations: list[int] = []  # of each save

    def counting_saves(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            self.operations.append(0)
            return function(*args)

        return run

    def counting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if self.operations:
                self.operations[-1] += 1
                is_it = len(self.operations) == self._save and self.operations[-1] == self._operation
                if is_it:
                    os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return run


main(*sys.argv[1:])
