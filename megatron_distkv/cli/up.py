"""`distkv up`: a whole pool on this host, until Ctrl-C."""

import argparse
import signal
import threading
from pathlib import Path
from typing import Any

from megatron_distkv.cli.instance_arguments import add_instance_arguments
from megatron_distkv.config.base import load_config, parse_config
from megatron_distkv.config.cluster import ClusterConfig
from megatron_distkv.errors import UserError
from megatron_distkv.launch.local_cluster import LocalCluster
from megatron_distkv.ledger import shown
from megatron_distkv.log import setup_logging
from megatron_distkv.pool import picture_of, render_debts

# How often the parts are looked after.
WATCH_INTERVAL_S = 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, help="YAML file of a ClusterConfig; the options below win")
    add_instance_arguments(parser)
    parser.add_argument("--instances", type=int, help="serving instances")
    parser.add_argument("--tensor-parallel", type=int, help="ranks of each instance")
    parser.add_argument("--num-rblocks", type=int, help="rBlocks in each instance's pool")
    parser.add_argument("--num-host-rblocks", type=int, help="rBlocks in each instance's host memory, beside its pool")
    parser.add_argument("--num-lent-host-rblocks", type=int, help="rBlocks of host memory that each instance lends")
    parser.add_argument("--lenders", type=int, help="memory-only lenders beside the instances")
    parser.add_argument("--lender-rblocks", type=int, help="rBlocks that each lender lends")
    parser.add_argument("--ledger", metavar="URL", help="ledger server; embedded:// starts one")
    parser.add_argument("--port", type=int, help="port of the gateway; 0 takes a free one")
    parser.add_argument("--launcher", choices=("deepspeed", "python"), help="how an instance is started")


def run(args: argparse.Namespace) -> int:
    setup_logging("up")
    config = _config(args)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with LocalCluster(config) as cluster:
        print(f"{config.instances} instances serve {_found(cluster)} at {cluster.base_url} (Ctrl-C ends all)")
        print(f"ledger: distkv ledger --ledger {shown(cluster.ledger_url)} --pool {config.ledger.pool}")
        if cluster.secret_file is not None:
            print(f"who joins must know its secret: DISTKV_SECRET=$(cat {cluster.secret_file})")
        print(render_debts(picture_of(cluster.ledger.snapshot())), flush=True)
        reported: set[str] = set()
        while not stop.wait(WATCH_INTERVAL_S):
            for name in set(cluster.dead_parts()) - reported:
                print(f"{name} has ended: {cluster.child(name).error_line()}", flush=True)
                reported.add(name)
            if len(reported) == len(cluster.instance_ids) + len(cluster.lender_ids) + 2:
                raise UserError("every part of the pool has ended")
    return 0


def _found(cluster: LocalCluster) -> str:
    """What the first instance says that it loaded: format, family, parallelism and step."""
    return cluster.child(cluster.instance_ids[0]).line_after(" loading ") or str(cluster.config.model)


def _config(args: argparse.Namespace) -> ClusterConfig:
    values: dict[str, Any] = load_config(ClusterConfig, args.config).model_dump() if args.config else {}
    top = ("model", "instances", "tensor_parallel", "deterministic", "lenders", "lender_rblocks", "port", "launcher")
    for key in top:
        if getattr(args, key) is not None:
            values[key] = getattr(args, key)
    cache = {"num_rblocks": args.num_rblocks, "num_host_rblocks": args.num_host_rblocks,
             "num_lent_host_rblocks": args.num_lent_host_rblocks, "dtype": args.kv_cache_dtype}  # fmt: skip
    if given := {key: value for key, value in cache.items() if value is not None}:
        values["kv_cache"] = {**values.get("kv_cache", {}), **given}
    if args.verify is not None:
        values["lending"] = {**values.get("lending", {}), "verify_one_in": args.verify}
    if args.ledger is not None:
        values["ledger"] = {**values.get("ledger", {}), "url": args.ledger}
    elif "ledger" not in values:
        values["ledger"] = {"url": "embedded://"}
    return parse_config(ClusterConfig, values, str(args.config or "distkv up"))
