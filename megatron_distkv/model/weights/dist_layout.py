"""What a torch_dist checkpoint looks like on disk, for both of its writers.

DIR/latest_checkpointed_iteration.txt    "20" or "release"
DIR/iter_0000020/                        .metadata (the index), __r_n.distcp, common.pt (args), metadata.json

Megatron-core 0.19 writes no common.pt any more, but an object `common_state` into a .distcp file. It reads either;
older ones read common.pt alone, so that is what we write.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import StorageMeta

LATEST = "latest_checkpointed_iteration.txt"
INDEX = ".metadata"
COMMON = "common.pt"
BACKENDS = "metadata.json"
# Key of the object, as torch_dist names the only shard of one
COMMON_STATE = "common_state/shard_0_1"
_BACKENDS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


class PortableWriter(FileSystemWriter):
    """torch's, with the checkpoint's path in the index as a string: the class of a path in a pickle that Python 3.13
    wrote is `pathlib._local.PosixPath`, which no other Python has."""

    def storage_meta(self) -> StorageMeta | None:
        meta = super().storage_meta()
        return None if meta is None else replace(meta, checkpoint_id=str(meta.checkpoint_id))


def write_common(directory: Path, state: Mapping[str, Any]) -> None:
    """What is not a tensor: args, iteration."""
    torch.save(dict(state), directory / COMMON)


def write_backends(directory: Path) -> None:
    """The file by which readers know the format: written last in its folder."""
    (directory / BACKENDS).write_text(json.dumps(_BACKENDS))
