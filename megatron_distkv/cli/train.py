"""`distkv train`: a training run through the deepspeed launcher."""

import argparse
from pathlib import Path

from megatron_distkv.config.base import load_config
from megatron_distkv.config.train import TrainConfig
from megatron_distkv.errors import UserError
from megatron_distkv.launch.commands import train_command
from megatron_distkv.launch.processes import run_until_end


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, required=True, help="YAML file of a TrainConfig")
    parser.add_argument("--output", type=Path, required=True, help="directory for checkpoints, log.jsonl, loss.png")
    parser.add_argument("--ranks", type=int, default=2, help="processes: tensor x context x data parallel")
    parser.add_argument("--text", type=Path, help="text to train on, instead of the configuration's")
    parser.add_argument("--resume", action="store_true", help="go on from the latest checkpoint in the output")


def run(args: argparse.Namespace) -> int:
    config = load_config(TrainConfig, args.config)
    tensor, context = config.tensor_parallel, config.context_parallel
    if args.ranks % (tensor * context):
        sentence = f"--ranks {args.ranks} is no multiple of tensor_parallel {tensor} x context_parallel {context}"
        raise UserError(sentence)
    if args.text is not None and not args.text.exists():
        raise UserError(f"--text {args.text} does not exist")
    command = train_command(args.config, args.output, args.ranks, text=args.text, resume=args.resume)
    return int(run_until_end(command))
