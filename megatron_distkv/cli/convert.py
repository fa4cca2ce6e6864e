"""`distkv convert`: any checkpoint that can be served -> Megatron torch_dist, in this one process.

One rank writes the whole model; torch_dist can be read at any tensor parallelism. The text side (tokenizer, chat
template) goes along, so that the copy serves like its source.
"""

import argparse
import shutil
import warnings
from pathlib import Path

warnings.filterwarnings("ignore", module="megatron.*")
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.*")

import torch.distributed as dist  # noqa: E402
from torch.distributed.checkpoint.api import CheckpointException  # noqa: E402

from megatron_distkv.config.model import ModelConfig  # noqa: E402
from megatron_distkv.errors import UserError  # noqa: E402
from megatron_distkv.model import (  # noqa: E402
    Checkpoint,
    build_gpt,
    find_checkpoint,
    init_tensor_parallel,
    load_weights,
)
from megatron_distkv.model.gpt import TORCH_DTYPES  # noqa: E402
from megatron_distkv.model.weights import CheckpointFormat, torch_dist  # noqa: E402

_TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="SRC", help="Hugging Face safetensors or Megatron torch_dist")
    parser.add_argument("target", type=Path, metavar="DST", help="a directory that is new or empty")
    parser.add_argument("--iteration", type=int, help="name of the written iteration; None: the source's, or 0")
    parser.add_argument("--dtype", choices=sorted(TORCH_DTYPES), help="of the written weights; None: the source's")


def run(args: argparse.Namespace) -> int:
    checkpoint = find_checkpoint(args.source)
    iteration = (checkpoint.step or 0) if args.iteration is None else args.iteration
    if iteration < 0:
        raise UserError(f"--iteration must not be negative (got {iteration})")
    _require_new(args.target)
    model = checkpoint.model.model_copy(update={"dtype": args.dtype or checkpoint.model.dtype})
    directory, text_files = _convert(checkpoint, model, args.target, iteration)
    print(f"{checkpoint} -> {directory} ({', '.join([model.dtype, *text_files])})")
    return 0


def _require_new(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file; give a directory that is new or empty")
    if target.is_dir() and any(target.iterdir()):
        raise UserError(f"{target} is not empty; give a directory that is new or empty")


def _convert(checkpoint: Checkpoint, model: ModelConfig, target: Path, iteration: int) -> tuple[Path, list[str]]:
    """Load all of it before the first byte is written: a damaged source leaves no target behind."""
    parallel = init_tensor_parallel(1)
    try:
        gpt = build_gpt(model, parallel)
        load_weights(gpt, checkpoint, model)
        try:
            return torch_dist.save(gpt, model, target, iteration), _copy_text_files(checkpoint, target)
        # A full disk is any of these: CheckpointException (a BaseException) has its cause's last words at its end.
        except (OSError, RuntimeError, CheckpointException) as error:
            reason = str(error).strip().splitlines()[-1]
            raise UserError(f"cannot write all of {target}, remove what is there: {reason}") from None
    finally:
        dist.destroy_process_group()


def _copy_text_files(checkpoint: Checkpoint, target: Path) -> list[str]:
    """Hugging Face keeps them beside the tensors, we beside the file that names the iteration."""
    source = checkpoint.directory if checkpoint.format is CheckpointFormat.HF else checkpoint.directory.parent
    names = [name for name in _TEXT_FILES if (source / name).is_file()]
    for name in names:
        shutil.copyfile(source / name, target / name)
    return names
