"""Run by test_memory.py in a process of its own: peak of anonymous memory while a checkpoint is loaded or converted.

usage: run_memory.py load|torch_dist|hf|legacy SOURCE TARGET; prints the growth over what the weights take.
"""

import sys
import threading
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")
import torch  # noqa: E402

from megatron_distkv.model import build_gpt, find_checkpoint, init_tensor_parallel, load_weights  # noqa: E402
from megatron_distkv.model.gpt import TORCH_DTYPES  # noqa: E402
from megatron_distkv.model.weights import CheckpointFormat, open_source, write_checkpoint  # noqa: E402
from megatron_distkv.model.weights.hf_writer import write_hf  # noqa: E402
from megatron_distkv.model.weights.parameters import model_parameters  # noqa: E402

FILE_BYTES = 16 << 20


def anonymous_bytes() -> int:
    """What this process holds beyond files' pages."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024


class Peak:
    def __enter__(self) -> "Peak":
        self._before = self._most = anonymous_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self._most = max(self._most, anonymous_bytes())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.growth = max(self._most, anonymous_bytes()) - self._before


def main() -> None:
    torch.set_num_threads(1)
    what, checkpoint, target = sys.argv[1], find_checkpoint(Path(sys.argv[2])), Path(sys.argv[3])
    model = checkpoint.model
    whole = sum(torch.Size(x.shape).numel() for x in model_parameters(model)) * TORCH_DTYPES[model.dtype].itemsize
    if what == "load":
        parallel = init_tensor_parallel(1)
        with Peak() as peak:
            load_weights(build_gpt(model, parallel), checkpoint, model)
    elif what == "hf":
        with Peak() as peak:
            write_hf(
                open_source(checkpoint, model), model, TORCH_DTYPES[model.dtype], target, max_file_bytes=FILE_BYTES
            )
    else:
        tp = 4 if what == "legacy" else 1
        with Peak() as peak:
            write_checkpoint(open_source(checkpoint, model), model, CheckpointFormat(what), target, tensor_parallel=tp)
    print(peak.growth / whole)


main()
