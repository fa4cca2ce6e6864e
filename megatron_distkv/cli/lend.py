"""`distkv lend`: host memory for a pool, from a process without a model."""

import argparse
import signal
import tempfile
import threading
import warnings
from pathlib import Path
from typing import Any

import torch

from megatron_distkv.cli.doctor import GIB, free_memory_bytes
from megatron_distkv.cli.pool_arguments import default_ledger
from megatron_distkv.config.base import add_options, parse_config, read_config
from megatron_distkv.config.instance import KVCacheConfig
from megatron_distkv.config.lender import LenderConfig
from megatron_distkv.engine.lender import Lender, num_rblocks_to_lend, shape_of_pool
from megatron_distkv.engine.rank_memory import rblock_shape
from megatron_distkv.errors import UserError
from megatron_distkv.kvcache.rblock_shape import RBlockShape
from megatron_distkv.ledger.opening import open_ledger
from megatron_distkv.log import setup_logging
from megatron_distkv.messages import happened_here


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, help="YAML or JSON file of a LenderConfig; the options below win")
    parser.add_argument("--memory", metavar="SIZE", help="host memory to lend: 64GiB, 500MB, 4096")
    parser.add_argument("--num-rblocks", type=int, help="the same as a number of rBlocks")
    parser.add_argument("--lender-id", help="unique in the pool")
    parser.add_argument("--run-dir", type=Path, help="where sockets lie")
    parser.add_argument("--threads", type=int, help="CPU threads for each debtor's attention")
    parser.add_argument("--ledger", metavar="URL", help=f"ledger server of the pool; else {default_ledger()}")
    parser.add_argument("--listen", metavar="tcp://HOST:PORT", help="lend to other hosts too")
    parser.add_argument("--pool", help="name of the pool in the ledger")
    parser.add_argument("--model", type=Path, help="checkpoint that the pool serves; else wait for its first instance")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="with --model: overrides the checkpoint's dtype")
    parser.add_argument("--kv-cache-dtype", choices=("auto", "int8"), default="auto", help="with --model: of its pool")
    parser.add_argument("--rblock-size", type=int, default=64, help="with --model: tokens per rBlock")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="with --model: ranks of each instance")


def run(args: argparse.Namespace) -> int:
    config = configuration(args)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    setup_logging(config.lender_id)
    torch.set_num_threads(config.threads)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    ledger = open_ledger(config.ledger.url, config.ledger.pool)
    shape = _shape(args) if args.model else shape_of_pool(ledger, stop)
    if shape is None:
        return _leave(config)
    size = _size(config, shape)
    lender = Lender(config, shape, ledger, counted=happened_here)
    try:
        print(f"{config.lender_id} lends {size} to pool {config.ledger.pool!r}", flush=True)
        print(f"READY {config.lender_id}", flush=True)
        lender.run(stop)
    finally:
        lender.close()
    return _leave(config)


def _leave(config: LenderConfig) -> int:
    """Tell who has started it that it was told to, and need not be started again."""
    print(f"LEFT {config.lender_id}", flush=True)
    return 0


def _size(config: LenderConfig, shape: RBlockShape) -> str:
    """In words; raises UserError for more than there is."""
    num_rblocks = num_rblocks_to_lend(config, shape)
    wanted, free = num_rblocks * shape.rblock_bytes, free_memory_bytes()
    if free is not None and wanted > free:
        raise UserError(f"{wanted / GIB:.1f} GiB are more than the {free / GIB:.1f} GiB that are free on this machine")
    return f"{num_rblocks} rBlocks of {shape.rblock_size} tokens ({wanted / GIB:.3g} GiB, {shape.kv_name})"


def _shape(args: argparse.Namespace) -> RBlockShape:
    warnings.filterwarnings("ignore", module="megatron.*")
    from megatron_distkv.model import find_checkpoint  # brings Megatron, which a lender does not need

    model = find_checkpoint(args.model).model
    model = model if args.dtype is None else model.model_copy(update={"dtype": args.dtype})
    cache = KVCacheConfig(rblock_size=args.rblock_size, dtype=args.kv_cache_dtype)
    return rblock_shape(model, cache, args.tensor_parallel)


def configuration(args: argparse.Namespace) -> LenderConfig:
    """The file's, and what the options add; raises ConfigError, or UserError where it does not say how much."""
    values: dict[str, Any] = read_config(args.config) if args.config else {}
    if args.memory is not None or args.num_rblocks is not None:
        values.update(memory=args.memory, num_rblocks=args.num_rblocks)
    top = {key: getattr(args, key) for key in ("lender_id", "run_dir", "threads")}
    values.update({key: value for key, value in top.items() if value is not None})
    if values.get("memory") is None and values.get("num_rblocks") is None:
        raise UserError("say how much to lend: --memory 64GiB, or --num-rblocks 1000")
    values.setdefault("run_dir", Path(tempfile.gettempdir()) / "distkv")
    values.setdefault("ledger", {} if args.config else {"url": default_ledger()})
    add_options(values, "ledger", {"url": args.ledger, "pool": args.pool})
    add_options(values, "network", {"listen": args.listen})
    config = parse_config(LenderConfig, values, str(args.config or "command line"))
    if config.ledger.url == "memory://":
        raise UserError("a lender shares a ledger server with its pool: give one by --ledger URL")
    return config
