"""Run by test_deepspeed.py on forked ranks: train a little with each ZeRO stage, save as DeepSpeed and as torch_dist.

usage: run_deepspeed.py CHECKPOINT,... TP DTYPE FOLDER STEPS STAGE...; leaves FOLDER/zeroSTAGE, with many checkpoints
FOLDER/CHECKPOINT'S NAME/zeroSTAGE
"""

import os
import sys
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")
os.environ["DS_ACCELERATOR"] = "cpu"
import torch  # noqa: E402

from megatron_distkv.config.train import OptimizerConfig  # noqa: E402
from megatron_distkv.model import (  # noqa: E402
    TensorParallel,
    build_gpt,
    find_checkpoint,
    init_tensor_parallel,
    load_weights,
)
from megatron_distkv.model.weights import torch_dist  # noqa: E402
from megatron_distkv.training.deepspeed_engine import build_engine, init_distributed, whole_parameters  # noqa: E402
from tests.forked import import_compiler  # noqa: E402

import_compiler()


def train(source: Path, dtype: str, folder: Path, steps: int, stages: list[int], parallel: TensorParallel) -> None:
    checkpoint = find_checkpoint(source)
    model = checkpoint.model.model_copy(update={"dtype": dtype})
    tokens = torch.randint(0, model.vocab_size, (2, 16), generator=torch.Generator().manual_seed(3))
    for stage in stages:
        gpt = build_gpt(model, parallel)
        load_weights(gpt, checkpoint, model)
        engine = build_engine(gpt, OptimizerConfig(learning_rate=1e-2), stage, bf16=dtype == "bf16")
        for _ in range(steps):
            loss = engine(tokens, None, None, labels=tokens).float().mean()
            engine.backward(loss)
            engine.step()
        out = folder / f"zero{stage}"
        engine.save_checkpoint(str(out / "deepspeed"), client_state={"step": 2})
        with whole_parameters(engine):
            torch_dist.save(engine.module, model, out, 2)
        del engine, gpt


def main() -> None:
    torch.set_num_threads(1)
    sources, tp, dtype, folder = sys.argv[1].split(","), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
    init_distributed()
    parallel = init_tensor_parallel(tp)
    for source in map(Path, sources):
        out = folder / source.name if len(sources) > 1 else folder
        train(source, dtype, out, int(sys.argv[5]), [int(stage) for stage in sys.argv[6:]], parallel)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
