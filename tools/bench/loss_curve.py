"""Losses of many steps through Megatron and DeepSpeed on two ranks, beside transformers and AdamW on one process.

Same weights, same batches, fp32; the differences of every step are checked against 1e-4.
usage: python -m tools.bench.loss_curve [--steps 50] [--json FILE]
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from megatron_distkv.config.train import TrainConfig
from tests.training.jobs import Job, Layout, launch
from tests.training.plain_llama import PlainRun, passkey_steps, whole_weights
from tests.training.test_deepspeed import VALUES
from tools.bench.machine import describe_machine

TOLERANCE = 1e-4
RUNS = [(Layout(data=2), 3), (Layout(tensor=2), 2), (Layout(context=2), 1)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--json", type=Path, help="write the losses there")
    args = parser.parse_args()
    values = {**VALUES, "steps": args.steps, "save_every": 0, "evaluate_every": 10**6}
    print(describe_machine())
    print(json.dumps(values))
    with tempfile.TemporaryDirectory() as folder:
        jobs = [Job(layout, stage, Path(folder) / f"{layout}-zero{stage}", values) for layout, stage in RUNS]
        start_s = time.monotonic()
        launch(jobs, Path(folder), deepspeed_ranks=2)
        print(f"{len(jobs)} runs of {args.steps} steps on two ranks: {time.monotonic() - start_s:.0f} s")
        config = TrainConfig.model_validate(values)
        plain = PlainRun(whole_weights(jobs[0].output, 1), config, passkey_steps(config)).losses
        curves = {job.output.name: job.seen()["losses"] for job in jobs}
    print(f"transformers: {plain[0]:.4f} -> {plain[-1]:.4f}")
    worst = {name: max(abs(x - y) for x, y in zip(plain, losses, strict=True)) for name, losses in curves.items()}
    for name, difference in worst.items():
        print(f"{name:24} largest difference of any step {difference:.1e}")
    if args.json is not None:
        args.json.write_text(json.dumps({"transformers": plain, **curves}, indent=1) + "\n")
    return 0 if max(worst.values()) <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
