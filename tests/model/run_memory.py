"""Run by test_memory.py in a process of its own: peak of anonymous memory while a checkpoint is loaded or converted.

usage: run_memory.py load:SOURCE: | part:SOURCE: | torch_dist:SOURCE:TARGET | hf:... | legacy:... ...

Prints each task's growth over what the weights take: for part, those of one of two tensor ranks. Memory that is freed
must go back to the system (MALLOC_MMAP_THRESHOLD_), or a task would grow into what the one before left.
"""

import json
import sys
import threading
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")
import torch  # noqa: E402

from megatron_distkv.config.model import ModelConfig  # noqa: E402
from megatron_distkv.model import (  # noqa: E402
    Checkpoint,
    build_gpt,
    find_checkpoint,
    init_tensor_parallel,
    load_weights,
)
from megatron_distkv.model.gpt import TORCH_DTYPES  # noqa: E402
from megatron_distkv.model.weights import CheckpointFormat, open_source, write_checkpoint  # noqa: E402
from megatron_distkv.model.weights.hf_writer import write_hf  # noqa: E402
from megatron_distkv.model.weights.parameters import model_parameters  # noqa: E402
from megatron_distkv.model.weights.source import rank_part  # noqa: E402

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


def weight_bytes(model: ModelConfig) -> int:
    return sum(torch.Size(x.shape).numel() for x in model_parameters(model)) * TORCH_DTYPES[model.dtype].itemsize


def read_part(checkpoint: Checkpoint) -> float:
    """One of two tensor ranks reads what it keeps."""
    model = checkpoint.model
    source = open_source(checkpoint, model)
    with Peak() as peak:
        kept = [torch.empty(x.shape_of(x.rank_extent(2))) for x in model_parameters(model)]
        for into, parameter in zip(kept, model_parameters(model), strict=True):
            into.copy_(rank_part(source, parameter, 1, 2))
    return peak.growth / sum(tensor.nbytes for tensor in kept)


def load(checkpoint: Checkpoint) -> float:
    parallel = init_tensor_parallel(1)
    with Peak() as peak:
        load_weights(build_gpt(checkpoint.model, parallel), checkpoint, checkpoint.model)
    return peak.growth / weight_bytes(checkpoint.model)


def convert(what: str, checkpoint: Checkpoint, target: Path) -> float:
    model = checkpoint.model
    source, dtype = open_source(checkpoint, model), TORCH_DTYPES[model.dtype]
    with Peak() as peak:
        if what == "hf":
            write_hf(source, model, dtype, target, max_file_bytes=FILE_BYTES)
        else:
            tp = 4 if what == "legacy" else 1
            write_checkpoint(source, model, CheckpointFormat(what), target, tensor_parallel=tp)
    return peak.growth / weight_bytes(model)


def main() -> None:
    torch.set_num_threads(1)
    shares = {}
    for task in sys.argv[1:]:
        what, source, target = task.split(":")
        checkpoint = find_checkpoint(Path(source))
        if what in ("load", "part"):
            shares[task] = (load if what == "load" else read_part)(checkpoint)
        else:
            shares[task] = convert(what, checkpoint, Path(target))
    print(json.dumps(list(shares.values())))


main()
