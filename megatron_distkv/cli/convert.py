"""`distkv convert`: any checkpoint that can be served -> Megatron torch_dist or legacy, or Hugging Face.

One process, one tensor at a time. The text side (tokenizer, chat template) goes along, so that the copy serves like
its source.
"""

import argparse
import shutil
import warnings
from pathlib import Path

warnings.filterwarnings("ignore", module="megatron.*")
warnings.filterwarnings("ignore", module="torch.distributed.*")

from torch.distributed.checkpoint.api import CheckpointException  # noqa: E402

from megatron_distkv.config.model import ModelConfig  # noqa: E402
from megatron_distkv.errors import UserError  # noqa: E402
from megatron_distkv.model import Checkpoint, find_checkpoint  # noqa: E402
from megatron_distkv.model.gpt import TORCH_DTYPES  # noqa: E402
from megatron_distkv.model.weights import CheckpointFormat, open_source, write_checkpoint  # noqa: E402
from megatron_distkv.model.weights.source import check  # noqa: E402

_TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", type=Path, metavar="SRC", help="Hugging Face safetensors, Megatron torch_dist or legacy, DeepSpeed"
    )
    parser.add_argument("target", type=Path, metavar="DST", help="a directory that is new or empty")
    parser.add_argument("--to", choices=("torch_dist", "hf", "legacy"), default="torch_dist", help="what to write")
    parser.add_argument("--tp", type=int, default=1, help="tensor ranks of the written pieces (any can be read back)")
    parser.add_argument("--iteration", type=int, help="name of the written iteration; None: the source's, or 0")
    parser.add_argument("--dtype", choices=sorted(TORCH_DTYPES), help="of the written weights; None: the source's")


def run(args: argparse.Namespace) -> int:
    checkpoint = find_checkpoint(args.source)
    iteration = (checkpoint.step or 0) if args.iteration is None else args.iteration
    if iteration < 0:
        raise UserError(f"--iteration must not be negative (got {iteration})")
    model = checkpoint.model.model_copy(update={"dtype": args.dtype or checkpoint.model.dtype})
    to = CheckpointFormat(args.to)
    _require_divisible(model, args.tp, to)
    _require_new(args.target)
    directory = _convert(checkpoint, model, args.target, to, iteration, args.tp)
    print(f"{checkpoint} -> {directory} ({', '.join([model.dtype, *_copy_text_files(checkpoint, args.target)])})")
    return 0


def _require_divisible(model: ModelConfig, tp: int, to: CheckpointFormat) -> None:
    if tp < 1:
        raise UserError(f"--tp must be at least 1 (got {tp})")
    if tp > 1 and to is CheckpointFormat.HF:
        raise UserError("Hugging Face checkpoints are not split over ranks: leave --tp out")
    for name, count in (("KV heads", model.num_kv_heads), ("ffn_hidden_size", model.mlp_hidden_size)):
        if count % tp:
            raise UserError(f"--tp {tp} does not divide the model's {name} ({count})")


def _require_new(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file; give a directory that is new or empty")
    if target.is_dir() and any(target.iterdir()):
        raise UserError(f"{target} is not empty; give a directory that is new or empty")


def _convert(
    checkpoint: Checkpoint, model: ModelConfig, target: Path, to: CheckpointFormat, iteration: int, tp: int
) -> Path:
    """Read all of it once before the first byte is written: a damaged source leaves no target behind."""
    source = open_source(checkpoint, model)
    check(source, model)
    try:
        return write_checkpoint(source, model, to, target, iteration=iteration, tensor_parallel=tp)
    # A full disk is any of these: CheckpointException (a BaseException) has its cause's last words at its end.
    except (OSError, RuntimeError, CheckpointException) as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"cannot write all of {target}, remove what is there: {reason}") from None


def _copy_text_files(checkpoint: Checkpoint, target: Path) -> list[str]:
    copied = []
    for name in _TEXT_FILES:
        found = next((place / name for place in checkpoint.text_directories() if (place / name).is_file()), None)
        if found is not None:
            shutil.copyfile(found, target / name)
            copied.append(name)
    return copied
