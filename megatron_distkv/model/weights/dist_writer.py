"""Write Megatron's torch_dist from any source, tensor by tensor: no model in memory, no process group."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_saver import save as save_state_dict
from tqdm import tqdm

from megatron_distkv.config.model import ModelConfig
from megatron_distkv.model.parameter import Parameter, Range
from megatron_distkv.model.weights.dist_layout import LATEST, PortableWriter, write_backends, write_common
from megatron_distkv.model.weights.dist_source import stored_names
from megatron_distkv.model.weights.megatron_args import write_args
from megatron_distkv.model.weights.parameters import model_parameters
from megatron_distkv.model.weights.source import Source

# Linear layers have an (empty) state for fp8 that Megatron's own loader asks for.
_WITH_EXTRA_STATE = ("linear_proj.weight", "linear_qkv.weight", "linear_fc1.weight", "linear_fc2.weight")


@dataclass(frozen=True)
class _Chunk:
    parameter: Parameter
    held: Range
    num_lead: int


def write_torch_dist(
    source: Source, model: ModelConfig, dtype: torch.dtype, path: Path, iteration: int, tensor_parallel: int = 1
) -> Path:
    """`path/iter_...` in the pieces that so many tensor ranks would have written, then the file that names it."""
    directory = path / f"iter_{iteration:07d}"
    directory.mkdir(parents=True)
    args = write_args(model, tensor_parallel=tensor_parallel)
    write_common(directory, {"args": args, "iteration": iteration, "checkpoint_version": 3.0})
    save_state_dict(
        {},
        storage_writer=PortableWriter(str(directory), thread_count=1),
        planner=_StreamingPlanner(source, model, dtype, tensor_parallel),
        no_dist=True,
    )
    write_backends(directory)
    (path / LATEST).write_text(str(iteration))
    return directory


class _StreamingPlanner(SavePlanner):
    """Tells torch's writer what will be written, and reads each piece from the source only when its turn comes."""

    def __init__(self, source: Source, model: ModelConfig, dtype: torch.dtype, tensor_parallel: int) -> None:
        self._source = source
        self._model = model
        self._dtype = dtype
        self._size = tensor_parallel
        self._chunks: dict[tuple[str, torch.Size], _Chunk] = {}

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        """Nothing: there is no state dict."""

    def create_local_plan(self) -> SavePlan:
        items = [item for parameter in model_parameters(self._model) for item in self._items(parameter)]
        items.extend(self._extra_states())
        self._bar = tqdm(total=len(items), desc="writing", unit="piece", leave=False, disable=None)
        return SavePlan(items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        self._bar.update()
        index = write_item.index
        if index.offset is None:
            empty = io.BytesIO()
            torch.save([None], empty)
            return empty
        chunk = self._chunks[index.fqn, index.offset]
        piece = self._source.read(chunk.parameter, chunk.held).to(self._dtype)
        return piece.reshape(*(1 for _ in range(chunk.num_lead)), *piece.shape).clone()

    def _items(self, parameter: Parameter) -> Iterator[WriteItem]:
        stored = stored_names(parameter.name, self._model)[0]
        lead = stored.lead
        size = torch.Size((*stored.lead_sizes, *parameter.shape))
        for held in _pieces(parameter, self._size):
            begin = [0] * len(parameter.shape)
            begin[parameter.dim] = held.start
            offsets = torch.Size((*lead, *begin))
            sizes = torch.Size((*(1 for _ in lead), *parameter.shape_of(held.extent)))
            self._chunks[stored.key, offsets] = _Chunk(parameter, held, len(lead))
            data = TensorWriteData(ChunkStorageMetadata(offsets, sizes), TensorProperties(dtype=self._dtype), size)
            yield WriteItem(MetadataIndex(stored.key, offsets), WriteItemType.SHARD, tensor_data=data)

    def _extra_states(self) -> Iterator[WriteItem]:
        for parameter in model_parameters(self._model):
            if parameter.name.endswith(_WITH_EXTRA_STATE):
                stored = stored_names(parameter.name, self._model)[0]
                at, of = (".".join(map(str, numbers)) for numbers in (stored.lead, stored.lead_sizes))
                key = f"{stored.key.removesuffix('weight')}_extra_state/shard_{at}_{of}"
                yield WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO)


def _pieces(parameter: Parameter, size: int) -> list[Range]:
    """Each rank's ranges in the order of the whole parameter; Megatron stores gate and up apart."""
    ranges = {held for rank in range(size) for held in parameter.rank_ranges(rank, size) if held.extent}
    return sorted(ranges)
