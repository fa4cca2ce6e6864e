"""The index of a torch_dist checkpoint: which bytes of which file are a tensor's piece, or an object."""

from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, TypeVar, cast

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_distkv.errors import CheckpointError
from megatron_distkv.model.weights.dist_layout import INDEX
from megatron_distkv.model.weights.safe_load import load_index, reason

Loaded = TypeVar("Loaded")


class DistIndex:
    def __init__(self, directory: Path) -> None:
        """Raises CheckpointError for an index that is damaged, hostile, or not there."""
        self._directory = directory
        index = load_index(directory / INDEX)
        try:
            self.tensors: dict[str, Any] = index.state_dict_metadata
            self._places: dict[MetadataIndex, Any] = index.storage_data
        except AttributeError:
            raise CheckpointError(f"{directory / INDEX} holds no index of tensors") from None

    def __contains__(self, key: str) -> bool:
        return key in self.tensors

    def file_of(self, key: str, offsets: torch.Size | None = None) -> Path:
        """The file with the piece of `key` at `offsets`, None for objects: in this directory, whatever it says."""
        return self._directory / Path(self._place(key, offsets).relative_path).name

    def read(self, key: str, offsets: torch.Size | None, load: Callable[[IO[bytes]], Loaded]) -> Loaded:
        """What `load` makes of the piece's bytes; raises CheckpointError, one sentence with file and key."""
        place, path = self._place(key, offsets), self.file_of(key, offsets)
        try:
            with path.open("rb") as file:
                return load(cast(IO[bytes], _create_file_view(file, place.offset, place.length)))
        except Exception as error:  # damaged files fail in every way there is
            kind = "object" if offsets is None else "tensor"
            raise CheckpointError(f"{path}: the {kind} {key} cannot be read: {reason(error)}") from None

    def _place(self, key: str, offsets: torch.Size | None) -> Any:
        place = self._places.get(MetadataIndex(key, offsets))
        if place is None:
            raise CheckpointError(f"{self._directory}: no file is named for a piece of the tensor {key}")
        return place
