"""Reading torch.save files and pickles of strangers without running anything that they name.

torch's weights_only unpickler builds tensors and plain data. Megatron and DeepSpeed also leave small objects of their
own in checkpoints (a loss scaler, an enum): those become `Opaque`, whatever class they were. Any other name is refused.
"""

import io
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
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
# Where Python 3.13, and no other, says that paths are at home
_PATHS_OF_3_13 = "pathlib._local"
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
        if not zipfile.is_zipfile(path):
            path.stat()
            raise CheckpointError(f"{path} is damaged, or was written by a torch before 1.6: it is no zip file")
        with _strangers_made_opaque(str(path)):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except _Stranger as error:
        raise CheckpointError(f"{path} is not loaded: {error}") from None
    except CheckpointError:
        raise
    except Exception as error:  # damaged files fail in every way there is
        raise CheckpointError(f"{path} cannot be read: {reason(error)}") from None


def load_object(file: IO[bytes]) -> Any:
    """What torch.save wrote, from a view of its bytes."""
    kept = io.BytesIO(file.read())
    with _strangers_made_opaque(kept):
        kept.seek(0)
        loaded = torch.load(kept, map_location="cpu", weights_only=True)
    return load_object(loaded) if isinstance(loaded, io.BytesIO) else loaded  # torch's planners save what is saved


class _Stranger(Exception):
    def __init__(self, name: str) -> None:
        super().__init__(f"its pickle names {name}, which is neither data nor known")


@contextmanager
def _strangers_made_opaque(file: str | io.BytesIO) -> Iterator[None]:
    """Raises _Stranger where the pickle names what is no trainer's."""
    unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    strangers = sorted(name for name in unsafe if not name.startswith(_TRAINERS))
    if strangers:
        raise _Stranger(strangers[0])
    with torch.serialization.safe_globals([(Opaque, name) for name in unsafe]):
        yield


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
        if module == _PATHS_OF_3_13:
            module = "pathlib"
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
