"""Megatron's torch_dist checkpoints (dist_layout.py): any tensor parallelism to any other."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.state_dict_saver import save as save_state_dict

from megatron_distkv.config.model import ModelConfig
from megatron_distkv.errors import CheckpointError
from megatron_distkv.model.megatron_gpt import MegatronGPT
from megatron_distkv.model.weights import legacy
from megatron_distkv.model.weights.dist_index import DistIndex
from megatron_distkv.model.weights.dist_layout import (
    BACKENDS,
    COMMON,
    COMMON_STATE,
    INDEX,
    LATEST,
    PortableWriter,
    write_backends,
    write_common,
)
from megatron_distkv.model.weights.megatron_args import args_of, read_args, write_args
from megatron_distkv.model.weights.safe_load import load_object, safe_load


def find_iteration(path: Path) -> tuple[Path, int | None] | None:
    """The folder with the tensors and its iteration: `path` itself, or the latest below it. None: not Megatron's.

    The folder holds torch_dist (with metadata.json) or the legacy format; raises CheckpointError for neither.
    """
    if _is_iteration(path):
        digits = path.name.removeprefix("iter_")
        return path, int(digits) if digits.isdigit() else None
    latest = path / LATEST
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
    return (path / BACKENDS).exists() or bool(legacy.rank_files(path))


def read_config(directory: Path) -> ModelConfig:
    """The model's shape from the args; raises CheckpointError when it is none that we can build."""
    args, where = _args(directory)
    return read_args(args, str(where))


def parallelism(directory: Path) -> str:
    """Of the ranks that wrote it, in words."""
    args, _ = _args(directory)
    sizes = (args.get(f"{kind}_model_parallel_size") or 1 for kind in ("tensor", "pipeline"))
    return "TP {}, PP {}".format(*sizes)


def _args(directory: Path) -> tuple[dict[str, Any], Path]:
    """With the file that they lie in."""
    path = directory / COMMON
    if not path.exists() and (directory / INDEX).exists():
        index = DistIndex(directory)
        if COMMON_STATE in index:
            path = index.file_of(COMMON_STATE)
            return args_of(index.read(COMMON_STATE, None, lambda file: load_object(file)[0]), path), path
    return args_of(safe_load(path), path), path


def save(
    gpt: MegatronGPT, config: ModelConfig, path: Path, iteration: int, more: Mapping[str, Any] | None = None
) -> Path:
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
    _write(state, directory)
    dist.barrier()
    if dist.get_rank() == 0:
        write_backends(directory)
        (path / LATEST).write_text(str(iteration))
    dist.barrier()
    return directory


def _metadata() -> dict[str, Any]:
    return {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}


def _write(state: dict[str, Any], directory: Path) -> None:
    """Through torch.distributed.checkpoint alone: Megatron's own writer needs CUDA, and since 0.19 takes no other."""
    sharded, common = save_preprocess(state)
    if dist.get_rank() == 0:
        write_common(directory, common)
    flat, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, True)
    save_state_dict(
        mcore_to_pyt_state_dict(flat, False),
        storage_writer=PortableWriter(str(directory)),
        planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
    )
