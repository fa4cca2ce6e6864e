"""What a run tells: a progress bar, log.jsonl, TensorBoard where it is installed, and at the end a plot."""

import contextlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

LOG_FILE, PLOT_FILE = "log.jsonl", "loss.png"
_SHOWN = {"loss": ".3f", "held_out_loss": ".3f", "recall": ".2f", "tokens_per_s": ".0f", "mfu": ".1%"}


class RunLog:
    """One line of JSON per step: `step`, `loss`, `learning_rate`, `gradient_norm`, `tokens`, `tokens_per_s`, `mfu`;
    where it was measured also `held_out_loss` or `recall`.

    Ranks other than the first say nothing.
    """

    def __init__(self, output: Path, first_step: int, steps: int, *, is_first: bool) -> None:
        self._output = output
        self._is_first = is_first
        self._steps = range(first_step, steps)
        self._shown: dict[str, str] = {}
        if is_first:
            _forget_after(output / LOG_FILE, first_step)
        self._board = _tensorboard(output, first_step) if is_first else None

    def steps(self) -> Iterator[int]:
        self._bar: Any = tqdm(self._steps, "training", disable=not self._is_first, unit="step", mininterval=1.0)
        return iter(self._bar)

    def write(self, step: int, **values: float) -> None:
        if not self._is_first:
            return
        self._shown.update({key: format(values[key], form) for key, form in _SHOWN.items() if key in values})
        self._bar.set_postfix(self._shown)
        with (self._output / LOG_FILE).open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self._board is not None:
            for key, value in values.items():
                self._board.add_scalar(key, value, step)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
        if self._is_first and importlib.util.find_spec("matplotlib"):
            plot_losses(self._output / LOG_FILE, self._output / PLOT_FILE)


def read_log(path: Path) -> list[dict[str, float]]:
    """A line that was cut off by a crash does not count."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines


def plot_losses(log: Path, picture: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = read_log(log)
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for key, style in (("loss", "-"), ("held_out_loss", "o-")):
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=key.replace("_", " "), linewidth=1)
    axes.set(xlabel="step", ylabel="loss")
    axes.legend()
    figure.savefig(picture, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def _forget_after(path: Path, step: int) -> None:
    """Steps that this run will take again."""
    if not path.exists():
        return
    kept = [json.dumps(line) + "\n" for line in read_log(path) if line["step"] <= step] if step else []
    fresh = path.with_suffix(".new")
    fresh.write_text("".join(kept))
    fresh.replace(path)


def _tensorboard(output: Path, first_step: int) -> Any:
    """torch's writer needs a package of its own."""
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(output / "tensorboard"), purge_step=first_step + 1)
