"""DeepSpeed's checkpoints of a Megatron-core model, ZeRO 0 to 3, as `save_checkpoint` leaves them.

DIR/latest                                               "global_step20"
DIR/global_step20/mp_rank_TT_model_states.pt             ZeRO 0-2: each tensor rank's weights
DIR/global_step20/zero_pp_rank_D_mp_rank_TT_model_states.pt   ZeRO 3: the order and shapes of the weights ...
DIR/global_step20/[bf16_]zero_pp_rank_D_mp_rank_TT_optim_states.pt   ... and each data rank's piece of them, fp32

DeepSpeed knows no model shape: it is taken from Megatron's args or our `model` in the client state, else from what
lies beside or above the directory (our training leaves a torch_dist checkpoint there, others a config.json).
"""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from megatron_distkv.config.base import parse_config
from megatron_distkv.config.model import ModelConfig
from megatron_distkv.errors import CheckpointError
from megatron_distkv.model.weights import hf_config, torch_dist
from megatron_distkv.model.weights.megatron_args import args_of, read_args
from megatron_distkv.model.weights.parts_source import Part, PartsSource
from megatron_distkv.model.weights.safe_load import safe_load

_WHOLE = re.compile(r"mp_rank_(\d+)_model_states\.pt$")
_SHARDED = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_model_states\.pt$")


class Layout(NamedTuple):
    tensor_parallel: int
    data_parallel: int
    zero_stage: int


def find_tag(path: Path) -> Path | None:
    """The folder with the files: `path` itself, or the one that `latest` names. None: another format."""
    if _states(path):
        return path
    latest = path / "latest"
    if not latest.is_file():
        return None
    tag = path / Path(latest.read_text().strip()).name
    if any(tag.glob("layer_*-model_states.pt")):
        raise CheckpointError(f"{tag}: DeepSpeed's pipeline checkpoints are not supported yet")
    if not _states(tag):
        raise CheckpointError(f"{latest} names {tag.name}, but there are no model states in it")
    return tag


def step_of(tag: Path) -> int | None:
    digits = re.search(r"(\d+)$", tag.name)
    return int(digits[1]) if digits else None


def _states(tag: Path) -> dict[tuple[int, int], Path]:
    """Model states by (tensor rank, data rank)."""
    found = {}
    for path in sorted(tag.iterdir()) if tag.is_dir() else ():
        if matched := _SHARDED.match(path.name):
            found[int(matched[2]), int(matched[1])] = path
        elif matched := _WHOLE.match(path.name):
            found[int(matched[1]), 0] = path
    return found


def read_layout(tag: Path) -> Layout:
    """Raises CheckpointError when a rank's file is missing."""
    states = _states(tag)
    first = next(iter(states.values()))
    state = safe_load(first)
    is_sharded = bool(_SHARDED.match(first.name))
    stage = 3 if is_sharded else int(state.get("ds_config", {}).get("zero_optimization", {}).get("stage", 0))
    layout = Layout(int(state.get("mp_world_size") or 1), int(state.get("dp_world_size") or 1), stage)
    for tensor_rank in range(layout.tensor_parallel):
        for data_rank in range(layout.data_parallel if is_sharded else 1):
            if (tensor_rank, data_rank) not in states:
                piece = f"zero_pp_rank_{data_rank}_" if is_sharded else ""
                raise CheckpointError(f"{tag}: {piece}mp_rank_{tensor_rank:02d}_model_states.pt is missing")
    return layout


def read_config(tag: Path) -> ModelConfig:
    path = next(iter(_states(tag).values()))
    state = safe_load(path)
    if isinstance(state.get("model"), dict):
        return parse_config(ModelConfig, state["model"], str(path))
    if state.get("args") is not None:
        return read_args(args_of(state, path), str(path))
    for place in (tag, tag.parent, tag.parent.parent):
        if (place / "config.json").exists():
            return hf_config.read_config(place)
        if (found := torch_dist.find_iteration(place)) is not None:
            return torch_dist.read_config(found[0])
    raise CheckpointError(
        f"{path} holds no args, and there is no config.json and no torch_dist checkpoint in {tag}, {tag.parent} or"
        f" {tag.parent.parent}: the model's shape is unknown"
    )


def open_deepspeed(tag: Path) -> PartsSource:
    layout = read_layout(tag)
    return PartsSource([_part(tag, rank, layout) for rank in range(layout.tensor_parallel)])


def _part(tag: Path, tensor_rank: int, layout: Layout) -> Part:
    states = _states(tag)
    if layout.zero_stage == 3:
        pieces = Zero3Weights(tag, tensor_rank, [states[tensor_rank, x] for x in range(layout.data_parallel)])
        return Part(pieces, {}, tag)
    path = states[tensor_rank, 0]
    module = safe_load(path).get("module")
    if not isinstance(module, dict):
        raise CheckpointError(f"{path} holds no module")
    tensors = {str(name).removeprefix("module."): x for name, x in module.items() if isinstance(x, torch.Tensor)}
    return Part(tensors, dict.fromkeys(tensors, path), tag)


class Zero3Weights(Mapping[str, torch.Tensor]):
    """One tensor rank's weights out of the data ranks' flat pieces: made whole one at a time, when asked for.

    Each parameter is cut into as many equal pieces as there are data ranks, the last one padded; a data rank's pieces
    lie one after the other, in the order of `param_shapes`.
    """

    def __init__(self, tag: Path, tensor_rank: int, states: list[Path]) -> None:
        shapes = safe_load(states[0]).get("param_shapes")
        if not shapes:
            raise CheckpointError(f"{states[0]} holds no param_shapes")
        self._paths = [_optimizer_file(tag, tensor_rank, rank) for rank in range(len(states))]
        self._flat = [_flat_groups(path) for path in self._paths]
        self._places: dict[str, tuple[int, torch.Size]] = {}
        offset = 0
        for name, shape in (item for group in shapes for item in group.items()):
            self._places[str(name).removeprefix("module.")] = (offset, torch.Size(shape))
            offset += self._each(shape)
        for path, groups in zip(self._paths, self._flat, strict=True):
            if sum(group.numel() for group in groups) < offset:
                raise CheckpointError(f"{path} holds fewer weights than {states[0].name} names")

    def _each(self, shape: torch.Size) -> int:
        return -(-math.prod(shape) // len(self._paths))

    def __getitem__(self, name: str) -> torch.Tensor:
        offset, shape = self._places[name]
        pieces = [_window(groups, offset, self._each(shape)) for groups in self._flat]
        return torch.cat(pieces)[: math.prod(shape)].view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _optimizer_file(tag: Path, tensor_rank: int, data_rank: int) -> Path:
    name = f"zero_pp_rank_{data_rank}_mp_rank_{tensor_rank:02d}_optim_states.pt"
    for path in (tag / name, tag / f"bf16_{name}"):
        if path.exists():
            return path
    raise CheckpointError(f"{tag}: {name} is missing")


def _flat_groups(path: Path) -> list[torch.Tensor]:
    groups = safe_load(path).get("optimizer_state_dict", {}).get("fp32_flat_groups")
    if not groups:
        raise CheckpointError(f"{path} holds no fp32_flat_groups")
    return [group.flatten() for group in groups]


def _window(groups: list[torch.Tensor], offset: int, count: int) -> torch.Tensor:
    """`count` numbers from `offset` on, as if the groups were one tensor."""
    parts = []
    for group in groups:
        low, high = max(offset, 0), min(offset + count, group.numel())
        if low < high:
            parts.append(group[low:high])
        offset -= group.numel()
    return parts[0] if len(parts) == 1 else torch.cat(parts)
