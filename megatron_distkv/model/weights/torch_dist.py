"""Megatron's torch_dist checkpoints: any tensor parallelism to any other.

DIR/latest_checkpointed_iteration.txt    "20" or "release"
DIR/iter_0000020/                        .metadata, __r_n.distcp, common.pt (args), metadata.json
"""

import argparse
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.models.gpt import GPTModel
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as save_state_dict

from megatron_distkv.config.base import parse_config
from megatron_distkv.config.model import ModelConfig
from megatron_distkv.errors import CheckpointError

_LATEST = "latest_checkpointed_iteration.txt"


def find_iteration(path: Path) -> tuple[Path, int | None] | None:
    """The folder with the tensors and its iteration: `path` itself, or the latest below it. None: another format."""
    if (path / "metadata.json").exists():
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
    if not (directory / "metadata.json").exists():
        raise CheckpointError(f"{latest} names {directory.name}, but there is no torch_dist checkpoint in it")
    return directory, step


def read_config(directory: Path) -> ModelConfig:
    """The model's shape from the args in common.pt; raises CheckpointError when it is none that we can build."""
    args = _args(directory)
    for key, wanted in (("normalization", "RMSNorm"), ("swiglu", True), ("add_bias_linear", False)):
        found = args.get(key, wanted)
        if found != wanted:
            raise CheckpointError(f"{directory}: the model has {key}={found!r}; only {wanted!r} is supported yet")
    heads = args.get("num_attention_heads")
    values = {
        "num_layers": args.get("num_layers"),
        "hidden_size": args.get("hidden_size"),
        "ffn_hidden_size": args.get("ffn_hidden_size"),
        "num_attention_heads": heads,
        "num_kv_heads": (args.get("num_query_groups") if args.get("group_query_attention", True) else None) or heads,
        "head_dim": args.get("kv_channels"),
        "vocab_size": args.get("vocab_size") or args.get("padded_vocab_size"),
        "rotary_percent": 0.0 if args.get("position_embedding_type") == "none" else args.get("rotary_percent", 1.0),
        "rotary_base": args.get("rotary_base", 10000),
        "norm_epsilon": args.get("norm_epsilon", 1e-5),
        "tie_embeddings": not args.get("untie_embeddings_and_output_weights", False),
        "max_context_tokens": args.get("max_position_embeddings"),
        "dtype": "bf16" if args.get("bf16") else "fp32",
        "eos_token_ids": tuple(args.get("eos_token_ids", ())),
    }
    return parse_config(ModelConfig, values, f"{directory}/common.pt")


def _args(directory: Path) -> dict[str, Any]:
    path = directory / "common.pt"
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            args = torch.load(path, map_location="cpu", weights_only=True).get("args")
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
    if args is None:
        raise CheckpointError(f"{path} holds no args: the model's shape is unknown")
    return vars(args) if isinstance(args, argparse.Namespace) else dict(args)


def load(gpt: GPTModel, directory: Path) -> None:
    """Fill `gpt` from any tensor parallelism."""
    sharded = gpt.sharded_state_dict(metadata=_metadata())
    _check_shapes(sharded, directory)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = dist_checkpointing.load(sharded, str(directory))
    except (CheckpointingException, CheckpointException, UnpicklingError, OSError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{directory} cannot be loaded: {str(error).strip().splitlines()[0]}") from None
    gpt.load_state_dict(state, strict=False)  # Megatron's _extra_state entries are empty here


def _check_shapes(sharded: dict[str, Any], directory: Path) -> None:
    try:
        stored = dist_checkpointing.load_tensors_metadata(str(directory))
    except Exception as error:
        raise CheckpointError(f"{directory} has no readable metadata: {str(error).strip().splitlines()[0]}") from None
    for name, tensor in sharded.items():
        if not isinstance(tensor, ShardedTensor):
            continue
        if tensor.key not in stored:
            raise CheckpointError(f"{directory}: the tensor {tensor.key} is missing")
        found, wanted = tuple(stored[tensor.key].global_shape), tuple(tensor.global_shape)
        if found != wanted and not tensor.allow_shape_mismatch:
            raise CheckpointError(f"{directory}: the tensor {name} has shape {found}, the model needs {wanted}")


def save(gpt: GPTModel, config: ModelConfig, path: Path, iteration: int) -> Path:
    """Write `path/iter_...` from all ranks, then (rank 0, last) the file that names it. Returns the folder."""
    directory = path / f"iter_{iteration:07d}"
    if dist.get_rank() == 0:
        directory.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    state = dict(gpt.sharded_state_dict(metadata=_metadata()))
    state.update(args=megatron_args(config), iteration=iteration, checkpoint_version=3.0)
    dist_checkpointing.save(state, str(directory), sharded_strategy=_PlainTorchSave())
    dist.barrier()
    if dist.get_rank() == 0:
        (path / _LATEST).write_text(str(iteration))
    dist.barrier()
    return directory


def megatron_args(config: ModelConfig) -> argparse.Namespace:
    """What Megatron-LM keeps in its checkpoints, for this model."""
    return argparse.Namespace(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_kv_heads,
        group_query_attention=True,
        kv_channels=config.head_dim,
        vocab_size=config.vocab_size,
        padded_vocab_size=config.vocab_size,
        position_embedding_type="rope" if config.rotary_percent > 0 else "none",
        rotary_percent=config.rotary_percent,
        rotary_base=config.rotary_base,
        norm_epsilon=config.norm_epsilon,
        normalization="RMSNorm",
        swiglu=True,
        add_bias_linear=False,
        untie_embeddings_and_output_weights=not config.tie_embeddings,
        max_position_embeddings=config.max_context_tokens,
        bf16=config.dtype == "bf16",
        eos_token_ids=list(config.eos_token_ids),
    )


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
