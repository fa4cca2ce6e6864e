"""The Megatron seam: Megatron-core's GPTModel, unchanged but for its core attention."""

from megatron_distkv.model import megatron_core  # isort: skip  # before all that imports Megatron
from megatron_distkv.model.fingerprint import fingerprint
from megatron_distkv.model.gpt import GPT, build_gpt
from megatron_distkv.model.parallel import TensorParallel, init_tensor_parallel
from megatron_distkv.model.row_tiles import tile_rows
from megatron_distkv.model.weights import Checkpoint, find_checkpoint, load_weights

__all__ = [
    "GPT",
    "Checkpoint",
    "TensorParallel",
    "build_gpt",
    "find_checkpoint",
    "fingerprint",
    "init_tensor_parallel",
    "load_weights",
    "megatron_core",
    "tile_rows",
]
