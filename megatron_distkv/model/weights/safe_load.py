"""Reading torch.save files and pickles of strangers without running anything that they name.

torch's weights_only unpickler builds tensors and plain data. Megatron and DeepSpeed also leave small objects of their
own in checkpoints (a loss scaler, an enum): those become `Opaque`, whatever class they were. Any other name is refused.
"""

import pickle
import zipfile
from pathlib import Path
from typing import IO, Any

import torch

from megatron_distkv.errors import CheckpointError

_TRAINERS = ("megatron.", "deepspeed.", "megatron_distkv.")
_INDEX_CLASSES = {
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    )
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "Path"),
    ("builtins", "set"),
}
_OLD_MEGATRON = ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata")


class Opaque:
    """Stands for an object of a trainer: takes any state, does nothing."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        pass


def safe_load(path: Path) -> Any:
    """What torch.save wrote, tensors memory-mapped on the CPU; raises CheckpointError, one sentence."""
    try:
        return _load(path)
    except CheckpointError:
        raise
    except Exception as error:  # damaged files fail in every way there is
        raise CheckpointError(f"{path} cannot be read: {reason(error)}") from None


def _load(path: Path) -> Any:
    if not zipfile.is_zipfile(path):
        path.stat()
        raise CheckpointError(f"{path} is damaged, or was written by a torch before 1.6: it is no zip file")
    unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    strangers = sorted(name for name in unsafe if not name.startswith(_TRAINERS))
    if strangers:
        raise CheckpointError(f"{path} is not loaded: its pickle names {strangers[0]}, which is neither data nor known")
    with torch.serialization.safe_globals([(Opaque, name) for name in unsafe]):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def load_piece(file: IO[bytes]) -> torch.Tensor:
    """One tensor of a torch_dist file, from a view of its bytes."""
    tensor = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{type(tensor).__name__} where a tensor should be")
    return tensor


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == _OLD_MEGATRON:
            return Opaque
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), (torch.dtype, torch.layout))
        if is_dtype or (module, name) in _INDEX_CLASSES:
            return super().find_class(module, name)
        raise CheckpointError(f"its pickle names {module}.{name}, which is neither data nor known")


def load_index(path: Path) -> Any:
    """The `.metadata` of torch.distributed.checkpoint; raises CheckpointError, one sentence."""
    try:
        with path.open("rb") as file:
            return _IndexUnpickler(file).load()
    except CheckpointError as error:
        raise CheckpointError(f"{path} is not loaded: {error}") from None
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read: {reason(error)}") from None


def reason(error: BaseException) -> str:
    """The first line of an exception's words, or its name."""
    words = str(error).strip().splitlines()
    return words[0] if words else type(error).__name__
