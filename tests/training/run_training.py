"""Trains one configuration after the other, each on as many ranks as it wants, and writes what it saw.

usage: run_training.py JOBS, a JSON list of {ranks, port, jobs: [{config, output, resume_from}]}. Whoever started this
process, the deepspeed launcher or nobody, it imports once and forks the ranks. Each
output gets, beside Trainer's own files, initial-R.pt (weights of tensor-parallel rank R before the first step) and
seen.json; or what attention_layer.py writes.
"""

import json
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")
os.environ["DS_ACCELERATOR"] = "cpu"
import matplotlib.pyplot  # noqa: E402, F401
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.utils.tensorboard  # noqa: E402
from megatron.core import parallel_state  # noqa: E402

from megatron_distkv.config.train import TrainConfig  # noqa: E402
from megatron_distkv.model.parallel import gather_vocabulary  # noqa: E402
from megatron_distkv.training.deepspeed_engine import whole_parameters  # noqa: E402
from megatron_distkv.training.train import Trainer  # noqa: E402
from tests.forked import fork, import_compiler  # noqa: E402
from tests.training.attention_layer import run_attention  # noqa: E402


def main() -> int:
    import_compiler()
    launched, mine = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", "1"), ("RANK", "0")))
    for group in json.loads(Path(sys.argv[1]).read_text()):
        num_ranks = group["ranks"]
        ranks = range(mine * num_ranks // launched, (mine + 1) * num_ranks // launched)
        children = [fork(lambda rank=rank, group=group: run_group(rank, group)) for rank in ranks]
        if any(os.waitpid(child, 0)[1] for child in children):
            return 1
    return 0


def run_group(rank: int, group: dict[str, Any]) -> None:
    ranks, port = str(group["ranks"]), str(group["port"])
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": ranks, "LOCAL_SIZE": ranks}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for job in group["jobs"]:
        config = TrainConfig.model_validate(job["config"])
        run = run_attention if job["is_attention"] else train
        run(config, Path(job["output"]), job["resume_from"])
        parallel_state.destroy_model_parallel()  # the next job may have another layout
    dist.barrier()
    dist.destroy_process_group()


def train(config: TrainConfig, output: Path, resume_from: str | None) -> None:
    if resume_from is not None and int(os.environ["RANK"]) == 0:
        leave_checkpoint(Path(resume_from), output)
    if dist.is_initialized():
        dist.barrier()
    trainer = Trainer(config, output, resume=resume_from is not None)
    first_step = trainer.step
    save_weights(trainer, output)
    losses = trainer.run()
    logprobs = next_token_logprobs(trainer, [list(range(65, 65 + n)) for n in (1, 9, 40)])
    if dist.get_rank() == 0:
        seen = {"first_step": first_step, "losses": losses, "logprobs": logprobs}
        (output / "seen.json").write_text(json.dumps(seen))
    trainer.engine.destroy()


def leave_checkpoint(iteration: Path, output: Path) -> None:
    """An output as if its run had been killed after this checkpoint."""
    shutil.copytree(iteration, output / iteration.name)
    (output / "latest_checkpointed_iteration.txt").write_text(str(int(iteration.name.removeprefix("iter_"))))


def save_weights(trainer: Trainer, output: Path) -> None:
    with whole_parameters(trainer.engine):
        weights = {name: p.detach().clone() for name, p in trainer.engine.module.named_parameters()}
    if parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0:
        torch.save(weights, output / f"initial-{parallel_state.get_tensor_model_parallel_rank()}.pt")


@torch.no_grad()
def next_token_logprobs(trainer: Trainer, prompts: list[list[int]]) -> list[Any]:
    logits = [gather_vocabulary(trainer.engine(torch.tensor([p]), None, None)[0, -1:]) for p in prompts]
    return torch.cat(logits).float().log_softmax(-1).tolist()


sys.exit(main())
