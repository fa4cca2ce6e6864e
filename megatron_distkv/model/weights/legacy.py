"""Megatron-LM's own checkpoints (ckpt_format torch): one file per tensor- and pipeline-parallel rank.

DIR/latest_checkpointed_iteration.txt            "20" or "release"
DIR/iter_0000020/mp_rank_TT/model_optim_rng.pt   or mp_rank_TT_PPP with pipeline stages, whose layers count from 0

Names are Megatron-core's (with its local or Transformer Engine's norms), or those of the classic `language_model`.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_distkv.config.model import ModelConfig
from megatron_distkv.errors import CheckpointError
from megatron_distkv.model.weights.megatron_args import args_of, read_args, write_args
from megatron_distkv.model.weights.parameters import model_parameters
from megatron_distkv.model.weights.parts_source import Part, PartsSource
from megatron_distkv.model.weights.safe_load import safe_load
from megatron_distkv.model.weights.source import Source, rank_part, with_progress

_LATEST = "latest_checkpointed_iteration.txt"
_FILES = ("model_optim_rng.pt", "model_rng.pt")
_RANK = re.compile(r"mp_rank_(\d+)(?:_(\d+))?$")
# Transformer Engine's and the classic names, after the layer's number.
_RENAMED = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    "input_norm.weight": "input_layernorm.weight",
    "post_attention_norm.weight": "pre_mlp_layernorm.weight",
    "post_attention_layernorm.weight": "pre_mlp_layernorm.weight",
    "self_attention.query_key_value.weight": "self_attention.linear_qkv.weight",
    "self_attention.query_key_value.bias": "self_attention.linear_qkv.bias",
    "self_attention.dense.weight": "self_attention.linear_proj.weight",
    "mlp.dense_h_to_4h.weight": "mlp.linear_fc1.weight",
    "mlp.dense_4h_to_h.weight": "mlp.linear_fc2.weight",
}
# Experts that Transformer Engine multiplies together.
_GROUPED = re.compile(r"mlp\.experts\.linear_fc([12])\.weight(\d+)$")
_FINAL_NORMS = {"decoder.final_norm.weight": "decoder.final_layernorm.weight"}


class RankFile(NamedTuple):
    tensor_rank: int
    stage: int
    path: Path


def rank_files(directory: Path) -> list[RankFile]:
    """The iteration's files, by tensor rank and stage; empty when this is another format."""
    found = []
    for folder in sorted(directory.iterdir()) if directory.is_dir() else ():
        matched = _RANK.match(folder.name)
        path = next((folder / name for name in _FILES if (folder / name).exists()), None)
        if matched and path is not None:
            found.append(RankFile(int(matched[1]), int(matched[2] or 0), path))
    return sorted(found)


class Layout(NamedTuple):
    """Ranks that wrote the checkpoint."""

    tensor_parallel: int
    stages: int


def read_layout(directory: Path) -> Layout:
    """Raises CheckpointError when a rank's file is missing."""
    files = rank_files(directory)
    args = _args(files[0].path)
    if (args.get("expert_model_parallel_size") or 1) > 1:
        raise CheckpointError(f"{directory}: experts spread over ranks (expert_model_parallel_size) are not read yet")
    layout = Layout(
        max(args.get("tensor_model_parallel_size") or 1, max(file.tensor_rank for file in files) + 1),
        max(args.get("pipeline_model_parallel_size") or 1, max(file.stage for file in files) + 1),
    )
    there = {(file.tensor_rank, file.stage) for file in files}
    for rank in range(layout.tensor_parallel):
        for stage in range(layout.stages):
            if (rank, stage) not in there:
                suffix = f"_{stage:03d}" if layout.stages > 1 else ""
                raise CheckpointError(f"{directory}: mp_rank_{rank:02d}{suffix} is missing, or has no {_FILES[0]}")
    return layout


def read_config(directory: Path) -> ModelConfig:
    path = rank_files(directory)[0].path
    return read_args(_args(path), str(path))


def _args(path: Path) -> dict[str, Any]:
    return args_of(safe_load(path), path)


def open_legacy(directory: Path) -> PartsSource:
    files = rank_files(directory)
    return PartsSource([_part(directory, files, rank) for rank in sorted({file.tensor_rank for file in files})])


def _part(directory: Path, files: list[RankFile], tensor_rank: int) -> Part:
    """One tensor rank: its stages one after the other, layers numbered through."""
    tensors: dict[str, torch.Tensor] = {}
    origin: dict[str, Path] = {}
    num_layers = 0
    for file in files:
        if file.tensor_rank != tensor_rank:
            continue
        stage = dict(_named(_model_state(file.path), num_layers))
        tensors.update({name: tensor for name, tensor in stage.items() if name not in tensors})
        origin.update(dict.fromkeys(stage, file.path))
        layers = [int(name.split(".")[2]) for name in stage if name.startswith("decoder.layers.")]
        num_layers = max(layers, default=num_layers - 1) + 1
    return Part(tensors, origin, directory / f"mp_rank_{tensor_rank:02d}")


def _model_state(path: Path) -> dict[str, Any]:
    state = safe_load(path)
    if "model0" in state:
        raise CheckpointError(f"{path}: interleaved (virtual) pipeline stages are not supported yet")
    if not isinstance(state.get("model"), dict):
        raise CheckpointError(f"{path} holds no model")
    if "language_model" in state["model"] and float(state.get("checkpoint_version") or 0) < 2.0:
        raise CheckpointError(f"{path}: checkpoint_version below 2.0 orders queries, keys and values in another way")
    return dict(state["model"])


def _named(state: dict[str, Any], first_layer: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors under Megatron-core's names, layers counted from `first_layer`."""
    for name, tensor in _flat(state, ""):
        name = name.removeprefix("module.").removeprefix("language_model.")
        name = re.sub(r"^(encoder|transformer)\.", "decoder.", name)
        name = _FINAL_NORMS.get(name, name)
        if name.startswith("decoder.layers."):
            _, _, layer, rest = name.split(".", 3)
            rest = _GROUPED.sub(r"mlp.experts.local_experts.\2.linear_fc\1.weight", _RENAMED.get(rest, rest))
            name = f"decoder.layers.{int(layer) + first_layer}.{rest}"
        yield name, tensor


def _flat(state: dict[str, Any], prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    for key, value in state.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, torch.Tensor):
            yield prefix + str(key), value


def write_legacy(source: Source, model: ModelConfig, dtype: torch.dtype, path: Path, iteration: int, size: int) -> Path:
    """One file for each of `size` tensor ranks, then the file that names the iteration."""
    directory = path / f"iter_{iteration:07d}"
    for rank in range(size):
        folder = directory / f"mp_rank_{rank:02d}"
        folder.mkdir(parents=True, exist_ok=True)
        state = _rank_state(source, model, dtype, rank, size)
        args = write_args(model, tensor_parallel=size)
        content = {"args": args, "checkpoint_version": 3.0, "iteration": iteration, "model": state}
        torch.save(content, folder / _FILES[0])
        del content, state  # before the next rank's come
    (path / _LATEST).write_text(str(iteration))
    return directory


def _rank_state(
    source: Source, model: ModelConfig, dtype: torch.dtype, rank: int, size: int
) -> dict[str, torch.Tensor]:
    parameters = with_progress(list(model_parameters(model)), f"rank {rank} of {size}")
    return {x.name: rank_part(source, x, rank, size).to(dtype).clone() for x in parameters}
