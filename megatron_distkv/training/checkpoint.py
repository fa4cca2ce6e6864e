"""Checkpoints of a run, one directory for all purposes: Megatron's torch_dist with the optimizer's states in it.

OUTPUT/iter_0000020/      weights (what serving reads), optimizer.state.{exp_avg,exp_avg_sq[,fp32_param]}.*, run.json
OUTPUT/latest_checkpointed_iteration.txt                                                        switched last

States lie there by parameter and without regard to ranks: any layout and ZeRO stage goes on from any other's. A save
happens in a hidden directory, reaches the disk, and only then takes its name: whoever dies in between leaves the
checkpoint before as it was.
"""

import ctypes
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from torch.distributed.checkpoint.api import CheckpointException

from megatron_distkv.config.train import TrainConfig
from megatron_distkv.errors import CheckpointError
from megatron_distkv.log import get_logger
from megatron_distkv.model.weights import torch_dist
from megatron_distkv.model.weights.safe_load import reason
from megatron_distkv.training.deepspeed_engine import whole_parameters
from megatron_distkv.training.optimizer_state import MASTER, MOMENTS, get_state, link_states, make_room, set_state

logger = get_logger(__name__)

_SAVING = ".saving"
_RUN_FILE = "run.json"
_LATEST = "latest_checkpointed_iteration.txt"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2

# Megatron's ShardedTensor, or a ShardedTensorFactory of several (gate and up)
Sharded = Any


class SavedRun(NamedTuple):
    """A checkpoint to go on from."""

    directory: Path
    step: int
    text: str | None
    """Fingerprint of what it was trained on; None: it does not say."""

    def require_text(self, fingerprint: str) -> None:
        """Raises CheckpointError for another text than the run's: its batches would be others from here on."""
        if self.text is None and dist.get_rank() == 0:
            logger.warning(
                "%s does not say what it was trained on: batches go on as they were only on the very same text",
                self.directory,
            )
        if self.text not in (None, fingerprint):
            raise CheckpointError(
                f"{self.directory} was trained on another text or tokenizer "
                f"(sha256 {str(self.text)[:12]}, this one is {fingerprint[:12]}):"
                " give the one it was trained on, or start a run on this one in another output"
            )


def find_run(output: Path, config: TrainConfig) -> SavedRun:
    """The latest checkpoint in `output`; raises CheckpointError where there is none of this run."""
    found = torch_dist.find_iteration(output)
    if found is None or not (found[0] / _RUN_FILE).exists():
        raise CheckpointError(f"nothing to resume from: no checkpoint of a training run in {output}")
    directory = found[0]
    model = torch_dist.read_config(directory)
    different = [key for key, value in model if value != getattr(config.model, key)]
    if different:
        was, now = (getattr(x, different[0]) for x in (model, config.model))
        raise CheckpointError(f"{directory} is of another model: {different[0]} was {was!r} and is {now!r}")
    saved = json.loads((directory / _RUN_FILE).read_text())
    if saved["seed"] != config.seed:
        raise CheckpointError(f"{directory} was trained with seed {saved['seed']}, not {config.seed}: other data")
    return SavedRun(directory, int(saved["step"]), saved.get("text"))


def save_run(engine: Any, config: TrainConfig, output: Path, step: int, text: str) -> None:
    """A collective of all ranks. `text`: the fingerprint of what is trained on."""
    hidden = output / _SAVING
    if dist.get_rank() == 0:
        shutil.rmtree(hidden, ignore_errors=True)
        hidden.mkdir(parents=True)
    dist.barrier()
    with whole_parameters(engine):
        states = dict(_sharded_states(engine, config))
        directory = torch_dist.save(engine.module, config.model, hidden, step, {"optimizer_state": states})
    if dist.get_rank() == 0:
        (directory / _RUN_FILE).write_text(json.dumps(_description(config, step, text)))
        _publish(directory, output, step)
        shutil.rmtree(hidden, ignore_errors=True)
        _remove_old(output, config.keep_checkpoints, step)
    dist.barrier()


def load_states(engine: Any, config: TrainConfig, run: SavedRun) -> None:
    """The optimizer's states, one kind at a time; the weights were loaded before the engine was built around them."""
    make_room(engine, run.step)
    with whole_parameters(engine):
        sharded = _sharded_parameters(engine)
        shapes = {name: (p, torch.Size(getattr(p, "ds_shape", p.shape))) for name, p in _parameters(engine)}
    for kind in _kinds(config):
        wanted = {
            name: make_sharded_optimizer_tensor(sharded[name], torch.empty(shape), f"optimizer.state.{kind}")
            for name, (_, shape) in shapes.items()
        }
        try:
            loaded = dist_checkpointing.load({"state": wanted}, str(run.directory))["state"]
        except (Exception, CheckpointException) as error:  # torch and Megatron raise all kinds for damaged files
            raise CheckpointError(f"{run.directory}: cannot read the optimizer's {kind}: {_reason(error)}") from None
        for name, (parameter, _) in shapes.items():
            set_state(engine, parameter, kind, loaded[name])


def _reason(error: BaseException) -> str:
    """The first line of what went wrong; torch keeps it in a collection of all ranks' failures."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return reason(error)


def _description(config: TrainConfig, step: int, text: str) -> dict[str, Any]:
    """Batches are a function of text, seed and step, and nothing else is random: that is all a run must remember."""
    layout = {"tensor": config.tensor_parallel, "context": config.context_parallel, "zero_stage": config.zero_stage}
    return {"step": step, "seed": config.seed, "text": text, "ranks": dist.get_world_size(), **layout}


def _kinds(config: TrainConfig) -> tuple[str, ...]:
    """fp32 weights are their own masters."""
    return (*MOMENTS, MASTER) if config.model.dtype == "bf16" else MOMENTS


def _parameters(engine: Any) -> list[tuple[str, torch.nn.Parameter]]:
    return list(engine.module.named_parameters())


def _sharded_parameters(engine: Any) -> dict[str, Sharded]:
    """Megatron's description of each parameter's place, by its name here."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    state = engine.module.sharded_state_dict(metadata={"dp_cp_group": group})
    return {name: state[name] for name, _ in _parameters(engine)}


def _sharded_states(engine: Any, config: TrainConfig) -> Iterator[tuple[str, Sharded]]:
    """Of each parameter one data-parallel rank saves the states, in turn: memory and writing are shared."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    link_states(engine)
    sharded = _sharded_parameters(engine)
    for number, (name, parameter) in enumerate(_parameters(engine)):
        for kind in _kinds(config):
            whole = get_state(engine, parameter, kind)
            if number % group.size() == group.rank():
                tensor = make_sharded_optimizer_tensor(sharded[name], whole, f"optimizer.state.{kind}")
                tensor.replica_id = (*tensor.replica_id[:-1], 0)
                yield f"{kind}.{name}", tensor


def _publish(directory: Path, output: Path, step: int) -> None:
    """Onto the disk first, under its name then, and last the file that names it."""
    for path in (*directory.rglob("*"), directory):
        _sync(path)
    target = output / directory.name
    if target.exists():
        _exchange(directory, target)
    else:
        directory.rename(target)
    _sync(output)
    latest = output / _SAVING / _LATEST
    latest.write_text(str(step))
    _sync(latest)
    latest.replace(output / _LATEST)
    _sync(output)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _exchange(one: Path, other: Path) -> None:
    """Two directories change names in one step; where the file system cannot, in two."""
    names = [os.fsencode(path) for path in (one, other)]
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) != 0:
        aside = one.with_name("replaced")
        other.rename(aside)
        one.rename(other)


def _remove_old(output: Path, kept: int, step: int) -> None:
    """All but the newest; what is newer than this step belongs to a run that was given up."""
    found = {int(path.name[5:]): path for path in output.glob("iter_*") if path.name[5:].isdigit()}
    older = sorted(number for number in found if number <= step)
    for number in set(found) - set(older[-kept:]):
        shutil.rmtree(found[number], ignore_errors=True)
