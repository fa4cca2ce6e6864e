"""One rank of a training run: `deepspeed --num_accelerators N launch/train.py --config FILE --output DIR`."""

import argparse
import os
import sys
import time
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")
os.environ.setdefault("DS_ACCELERATOR", "cpu" if not os.path.exists("/dev/nvidia0") else "cuda")

import torch.distributed as dist  # noqa: E402

from megatron_distkv.config.base import load_config  # noqa: E402
from megatron_distkv.config.train import TrainConfig  # noqa: E402
from megatron_distkv.errors import UserError  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="YAML file of a TrainConfig")
    parser.add_argument("--output", type=Path, required=True, help="directory for checkpoints and log.jsonl")
    parser.add_argument("--text", type=Path, help="text to train on, instead of the configuration's")
    parser.add_argument("--resume", action="store_true", help="go on from the latest checkpoint in the output")
    parser.add_argument("--local_rank", type=int, default=0, help="given by the launcher")
    args = parser.parse_args()
    try:
        config = load_config(TrainConfig, args.config)
        if args.text is not None:
            config = config.with_text(args.text)
        from megatron_distkv.training.train import Trainer

        Trainer(config, args.output, resume=args.resume).run()
    except UserError as error:
        # All ranks refuse the same input, and the launcher ends the others when one ends: the first one says it.
        time.sleep(0 if os.environ.get("RANK", "0") == "0" else 3)
        print(f"distkv train: {error}", file=sys.stderr, flush=True)
        os._exit(2)  # other ranks may wait in a collective: do not join them
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
