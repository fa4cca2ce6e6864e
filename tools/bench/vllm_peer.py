"""vLLM's CPU attention in a process of its own, timed in turn with ours: it brings other versions of most packages."""

import os
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import torch

from tools.bench.ceilings import TimedElsewhere

# vLLM's own default on CPUs.
BLOCK_SIZE = 128


class VllmPeer:
    """One process of the Python at `python`, which has vLLM; raises SystemExit with its last words if it ends."""

    def __init__(self, python: Path, num_threads: int) -> None:
        self._num_threads = num_threads
        self._folder = tempfile.TemporaryDirectory()
        self._process = subprocess.Popen(
            [python, "-W", "ignore", Path(__file__).with_name("vllm_op.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(num_threads)},
        )

    def __enter__(self) -> "VllmPeer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.communicate()
        self._folder.cleanup()

    def prepare(self, q_THD: torch.Tensor, k_XKD: torch.Tensor, v_XKD: torch.Tensor) -> torch.Tensor:
        """Its result `[T, H, D]` over these: causal, the queries are the last tokens. `work` then computes it again."""
        file = f"{self._folder.name}/case"
        torch.save((q_THD, k_XKD.contiguous(), v_XKD.contiguous()), file)
        self._ask(f"{file} {self._num_threads} {BLOCK_SIZE}")
        return torch.load(f"{file}.out")

    @property
    def work(self) -> TimedElsewhere:
        return TimedElsewhere(lambda: float(self._ask("run")))

    def _ask(self, line: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):  # it has ended: its last words say why
            print(line, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            _, errors = self._process.communicate()
            raise SystemExit(f"vLLM's process has ended: {(errors.splitlines() or ['no word'])[-1]}")
        return answer
