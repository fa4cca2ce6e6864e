"""Run by test_killed.py: training on one rank that kills itself, as by kill -9, in the middle of a save.

Each line on stdin is a run, a JSON list of CONFIG, OUTPUT, RESUME, SAVE, OPERATION, PORT: killed at the OPERATION-th
write to the disk (fsync, rename, replace, exchange) of its SAVE-th save; 0: never. Each run is a process forked from
this one, which has imported everything; for each, a line on stdout says how it ended.
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
import torch.utils.tensorboard  # noqa: E402, F401

from megatron_distkv.config.train import TrainConfig  # noqa: E402
from megatron_distkv.training import checkpoint, train  # noqa: E402
from tests.forked import fork, import_compiler  # noqa: E402


def main() -> None:
    import_compiler()
    for line in sys.stdin:
        child = fork(lambda line=line: run(*json.loads(line)))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    os._exit(0)  # Python's own name; there is nothing to tidy up, and that takes a while


def run(config: str, output: str, resume: bool, save: int, operation: int, port: int) -> None:
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    killer = Killer(save, operation)
    train.save_run = killer.counting_saves(train.save_run)  # type: ignore[attr-defined]
    # renameat2, for which os has no name, is a call of our own (the last one): to die at it, too, is the test
    for place, name in ((os, "fsync"), (os, "rename"), (os, "replace"), (checkpoint, "_exchange")):
        setattr(place, name, killer.counting(getattr(place, name)))
    losses = train.Trainer(TrainConfig.model_validate_json(Path(config).read_text()), Path(output), resume=resume).run()
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


main()
