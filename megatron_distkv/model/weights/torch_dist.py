"""Megatron's torch_dist checkpoints: any tensor parallelism to any other.

DIR/latest_checkpointed_iteration.txt    "20" or "release"
DIR/iter_0000020/                        .metadata, __r_n.distcp, common.pt (args), metadata.json
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.models.gpt import GPTModel
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as save_state_dict

from megatron_distkv.config.model import ModelConfig
from megatron_distkv.errors import CheckpointError
from megatron_distkv.model.weights import legacy
from megatron_distkv.model.weights.megatron_args import args_of, read_args, write_args
from megatron_distkv.model.weights.safe_load import safe_load

_LATEST = "latest_checkpointed_iteration.txt"


def find_iteration(path: Path) -> tuple[Path, int | None] | None:
    """The folder with the tensors and its iteration: `path` itself, or the latest below it. None: not Megatron's.

    The folder holds torch_dist (with metadata.json) or the legacy format; raises CheckpointError for neither.
    """
    if _is_iteration(path):
        digits = path.name.removeprefix("iter_")
        return path, int(digits) if digits.isdigit() else None
    latest = path / _LATEST
    if not latest.exists():
        return None
    name = latest.read_text().strip()
    if name == "release":
        directory, step = path / "release", None
    elif name.isdigit():
        directory, step = path / f"iter_{int(name):07d}", int(name)
    else:
        raise CheckpointError(f"{latest} says {name!r}: neither an iteration nor 'release'")
    if not _is_iteration(directory):
        raise CheckpointError(
            f"{latest} names {directory.name}, but there is neither metadata.json nor mp_rank_00 in it"
        )
    return directory, step


def _is_iteration(path: Path) -> bool:
    return (path / "metadata.json").exists() or bool(legacy.rank_files(path))


def read_config(directory: Path) -> ModelConfig:
    """The model's shape from the args in common.pt; raises CheckpointError when it is none that we can build."""
    return read_args(_args(directory), str(directory / "common.pt"))


def parallelism(directory: Path) -> str:
    """Of the ranks that wrote it, in words."""
    sizes = (_args(directory).get(f"{kind}_model_parallel_size") or 1 for kind in ("tensor", "pipeline"))
    return "TP {}, PP {}".format(*sizes)


def _args(directory: Path) -> dict[str, Any]:
    path = directory / "common.pt"
    return args_of(safe_load(path), path)


def save(gpt: GPTModel, config: ModelConfig, path: Path, iteration: int, more: Mapping[str, Any] | None = None) -> Path:
    """Write `path/iter_...` from all ranks, then (rank 0, last) the file that names it. Returns the folder.

    `more`: what to save beside the weights, such as an optimizer's states, in Megatron's sharded tensors.
    """
    directory = path / f"iter_{iteration:07d}"
    if dist.get_rank() == 0:
        directory.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    state = dict(gpt.sharded_state_dict(metadata=_metadata()))
    size = parallel_state.get_tensor_model_parallel_world_size()
    args = write_args(config, tensor_parallel=size)
    state.update(more or {}, args=args, iteration=iteration, checkpoint_version=3.0)
    dist_checkpointing.save(state, str(directory), sharded_strategy=_PlainTorchSave())
    dist.barrier()
    if dist.get_rank() == 0:
        (path / _LATEST).write_text(str(iteration))
    dist.barrier()
    return directory


def _metadata() -> dict[str, Any]:
    return {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}


class _PlainTorchSave(SaveShardedStrategy):
    """The torch_dist format through torch.distributed.checkpoint alone: Megatron's own writer needs CUDA."""

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)

    @property
    def can_handle_sharded_objects(self) -> bool:
        return True

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path) -> None:
        flat, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        save_state_dict(
            mcore_to_pyt_state_dict(flat, False),
            storage_writer=FileSystemWriter(str(checkpoint_dir)),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )

    def check_backend_compatibility(self, loaded_version: Any) -> None:
        pass

    def check_version_compatibility(self, loaded_version: Any) -> None:
        pass
