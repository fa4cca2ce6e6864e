"""One rank of one serving instance. Started by `deepspeed --num_accelerators TP launch/serve.py --config FILE`.

The leader (rank 0) prints READY when it takes requests, and ends on SIGTERM, SIGINT or the end of a drain, which LEFT
then says; followers end with their leader.
"""

import argparse
import os
import signal
import sys
import threading
import warnings
from pathlib import Path

warnings.filterwarnings("ignore", module="megatron.*")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from megatron_distkv.config.base import load_config  # noqa: E402
from megatron_distkv.config.instance import InstanceConfig  # noqa: E402
from megatron_distkv.engine.instance import Instance  # noqa: E402
from megatron_distkv.engine.rank import build_rank  # noqa: E402
from megatron_distkv.engine.serving import Serving  # noqa: E402
from megatron_distkv.engine.worker import Worker  # noqa: E402
from megatron_distkv.errors import SupersededError, UserError  # noqa: E402
from megatron_distkv.ledger.opening import open_ledger  # noqa: E402
from megatron_distkv.log import setup_logging  # noqa: E402
from megatron_distkv.model import init_tensor_parallel  # noqa: E402

# Channel threads answer other instances while the main thread computes: they must get the interpreter soon.
SWITCH_INTERVAL_S = 0.0005


def serve(config: InstanceConfig, stop: threading.Event) -> None:
    """Run this process's rank until `stop` is set."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    torch.set_num_threads(config.threads)
    parallel = init_tensor_parallel(config.tensor_parallel)
    setup_logging(config.instance_id if parallel.is_leader else f"{config.instance_id}.{parallel.rank}")
    rank = build_rank(config, parallel)
    if not parallel.is_leader:
        Worker(rank).run()
        return
    instance = Instance(rank, open_ledger(config.ledger.url, config.ledger.pool, clock=rank.clock))
    try:
        serving = Serving(instance)
        print(f"READY {config.instance_id}", flush=True)
        serving.run(stop)
    finally:
        instance.close()
    print(f"LEFT {config.instance_id}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="YAML or JSON file of an InstanceConfig")
    parser.add_argument("--local_rank", type=int, default=0, help="given by the launcher")
    args = parser.parse_args()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        serve(load_config(InstanceConfig, args.config), stop)
    except (UserError, SupersededError) as error:
        print(f"ERROR {error}", flush=True)
        print(f"distkv serve: {error}", file=sys.stderr)
        os._exit(error.exit_status)  # other ranks may wait in a collective: do not join them
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
