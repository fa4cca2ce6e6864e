"""Arguments that say how an instance computes, the same for one and for all of a pool."""

import argparse
from pathlib import Path


def add_instance_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, help="checkpoint: Hugging Face, Megatron torch_dist or legacy, DeepSpeed")
    parser.add_argument(
        "--kv-cache-dtype", choices=("auto", "int8"), help="of K and V; int8: half the memory of bf16; else the model's"
    )
    parser.add_argument("--verify", type=int, metavar="N", help="compute one in N remote partials again, and compare")
    parser.add_argument(
        "--deterministic",
        action="store_true",
        default=None,
        help="the same bits wherever rBlocks lie and whatever is in the batch",
    )
