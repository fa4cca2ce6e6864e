"""The folder with the logs of a pool's parts."""

import contextlib
import time
from pathlib import Path

from megatron_distkv.errors import UserError

# Of each part's lives before the one that runs: the first ones, where a trouble began, and the last ones.
NUM_FIRST_KEPT, NUM_LAST_KEPT = 10, 10


class LogFolder:
    """`NAME.log` is of the life that runs; `NAME.0.log`, `NAME.1.log` and so on of those before it."""

    def __init__(self, path: Path) -> None:
        """Raises UserError when it cannot be written."""
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            (path / ".probe").touch()
            (path / ".probe").unlink()
        except OSError as error:
            raise UserError(f"cannot write logs into {path}: {error.strerror}; choose another --log-dir") from None

    def new_log(self, name: str) -> Path:
        """For another life of a part: the log of the one before is kept under a number."""
        log = self.path / f"{name}.log"
        if log.exists():
            lives = self._lives(name)
            log.rename(self.path / f"{name}.{max(lives, default=-1) + 1}.log")
            if len(lives) >= NUM_FIRST_KEPT + NUM_LAST_KEPT:
                (self.path / f"{name}.{lives[NUM_FIRST_KEPT]}.log").unlink()
        return log

    def note(self, sentence: str) -> None:
        """What befell the pool as a whole, with the time: `up.log`."""
        with (self.path / "up.log").open("a") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {sentence}\n")

    def _lives(self, name: str) -> list[int]:
        numbers: list[int] = []
        for log in self.path.glob(f"{name}.*.log"):
            with contextlib.suppress(ValueError):
                numbers.append(int(log.name.removeprefix(f"{name}.").removesuffix(".log")))
        return sorted(numbers)
