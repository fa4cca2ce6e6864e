"""A checkpoint as the newest Megatron lays it out; its own writer needs CUDA."""

import io
import json
import shutil
from pathlib import Path

import torch
from megatron.core.dist_checkpointing import ShardedObject
from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, TensorStorageMetadata


def as_megatron_0_19_writes(directory: Path, *, common: object = None, saved_twice: bool = False) -> None:
    """Args and iteration leave common.pt and become an object in the .distcp files.

    `saved_twice`: as it comes from torch's own planner, which saves the bytes that torch.save has made once more.
    """
    kept, state = torch.load(directory / "common.pt", weights_only=False), {}
    for key, entry in FileSystemReader(str(directory)).read_metadata().state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            state[key] = torch.empty(entry.size, dtype=entry.properties.dtype)
    distributed_checkpoint.load(state, storage_reader=FileSystemReader(str(directory)), no_dist=True)
    blob = io.BytesIO()
    torch.save([kept if common is None else common], blob)
    blob.seek(0)
    shutil.rmtree(directory)
    directory.mkdir()
    key = ShardedObject("common_state", None, (1,), (0,)).unique_key
    writer = FileSystemWriter(str(directory))
    planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
    distributed_checkpoint.save(
        {**state, key: blob}, storage_writer=writer, planner=None if saved_twice else planner, no_dist=True
    )
    backends = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (directory / "metadata.json").write_text(json.dumps(backends))
