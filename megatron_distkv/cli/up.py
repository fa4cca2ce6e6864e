"""`distkv up`: a whole pool on this host, until Ctrl-C. A part that dies is started again."""

import argparse
import contextlib
import signal
import threading
import time
from pathlib import Path
from typing import Any

from megatron_distkv.cli.instance_arguments import add_instance_arguments
from megatron_distkv.config.base import add_options, parse_config, read_config
from megatron_distkv.config.cluster import ClusterConfig
from megatron_distkv.config.instance import KVCacheConfig
from megatron_distkv.errors import LedgerUnavailable, UserError
from megatron_distkv.launch.local_cluster import EMBEDDED, LocalCluster
from megatron_distkv.launch.supervision import Supervision
from megatron_distkv.ledger.url import shown
from megatron_distkv.log import setup_logging
from megatron_distkv.pool import picture_of, render_debts

# How often the parts are looked after.
WATCH_INTERVAL_S = 0.5


_CACHE = KVCacheConfig()
_RBLOCK = f"{_CACHE.rblock_size} tokens (default: {_CACHE.num_rblocks})"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "It prints where to send requests (OpenAI's API), where the logs are, and how to look at the ledger. A part "
        "that dies is started again. Ctrl-C ends all."
    )
    parser.add_argument("--config", type=Path, help="YAML file of a ClusterConfig; the options below win")
    add_instance_arguments(parser)
    parser.add_argument("--served-model-name", help=f"the model's name in the API{_else('served_model_name')}")
    parser.add_argument("--host", help=f"address of the gateway{_else('host')}")
    parser.add_argument("--port", type=int, help=f"port of the gateway{_else('port')}; 0 takes a free one")
    parser.add_argument("--instances", type=int, help=f"serving instances{_else('instances')}")
    parser.add_argument("--tensor-parallel", type=int, help=f"ranks of each instance{_else('tensor_parallel')}")
    parser.add_argument("--num-rblocks", type=int, help=f"KV memory of each instance, in rBlocks of {_RBLOCK}")
    parser.add_argument("--num-host-rblocks", type=int, help="rBlocks in each instance's host memory, beside its pool")
    parser.add_argument("--num-lent-host-rblocks", type=int, help="rBlocks of host memory that each instance lends")
    parser.add_argument("--lenders", type=int, help=f"memory-only lenders beside the instances{_else('lenders')}")
    parser.add_argument("--lender-rblocks", type=int, help=f"rBlocks that each lender lends{_else('lender_rblocks')}")
    parser.add_argument("--ledger", metavar="URL", help="ledger server; else one is started for this pool")
    parser.add_argument("--pool", help="name of the pool in the ledger (default: default)")
    parser.add_argument(
        "--launcher", choices=("deepspeed", "python"), help=f"how an instance is started{_else('launcher')}"
    )
    parser.add_argument("--log-dir", type=Path, metavar="DIR", help="keep the parts' logs here, whatever happens")


def _else(key: str) -> str:
    return f" (default: {ClusterConfig.model_fields[key].default})"


def run(args: argparse.Namespace) -> int:
    setup_logging("up")
    config = configuration(args)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    cluster = LocalCluster(config, say=_say, stop=stop, keeps_logs=True)
    try:
        with cluster:
            _say_where(cluster)
            supervision = Supervision(cluster)
            while not stop.wait(WATCH_INTERVAL_S):
                supervision.look(time.monotonic())
            cluster.keeps_logs = supervision.has_seen_failure
    except UserError as error:
        raise UserError(f"{error}; the logs are in {cluster.logs.path}" if cluster.logs else str(error)) from None
    if cluster.keeps_logs and cluster.logs is not None:
        _say(f"the logs are in {cluster.logs.path}, for parts had ended by themselves")
    return 0


def _say(sentence: str) -> None:
    with contextlib.suppress(BrokenPipeError):  # nobody reads it any more: no reason to end a pool
        print(sentence, flush=True)


def _say_where(cluster: LocalCluster) -> None:
    config = cluster.config
    found = cluster.child(cluster.instance_ids[0]).line_after(" loading ") or str(config.model)
    name = config.served_model_name
    _say(f"{config.instances} instances serve {found} at {cluster.base_url} (model name {name!r}, Ctrl-C ends all)")
    _say(f"ledger: distkv ledger --ledger {shown(cluster.ledger_url)} --pool {config.ledger.pool}")
    if cluster.secret_file is not None:
        _say(f"who joins must know its secret: DISTKV_SECRET=$(cat {cluster.secret_file})")
    with contextlib.suppress(LedgerUnavailable):
        _say(render_debts(picture_of(cluster.ledger.snapshot())))


def configuration(args: argparse.Namespace) -> ClusterConfig:
    """The file's, and what the options add; raises ConfigError, or UserError where no model is named."""
    values: dict[str, Any] = read_config(args.config) if args.config else {}
    top = ("model", "instances", "tensor_parallel", "deterministic", "lenders", "lender_rblocks", "host", "port",
           "served_model_name", "launcher", "log_dir")  # fmt: skip
    for key in top:
        if getattr(args, key) is not None:
            values[key] = getattr(args, key)
    cache = {"num_rblocks": args.num_rblocks, "num_host_rblocks": args.num_host_rblocks,
             "num_lent_host_rblocks": args.num_lent_host_rblocks, "dtype": args.kv_cache_dtype}  # fmt: skip
    add_options(values, "kv_cache", cache)
    add_options(values, "lending", {"verify_one_in": args.verify})
    if "model" not in values:
        raise UserError("say which checkpoint to serve: --model DIR")
    values.setdefault("ledger", {"url": EMBEDDED})
    add_options(values, "ledger", {"url": args.ledger, "pool": args.pool})
    return parse_config(ClusterConfig, values, str(args.config or "command line"))
