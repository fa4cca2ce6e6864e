"""`distkv serve`: one serving instance, as a deepspeed job (or, on one rank, as this process)."""

import argparse
import sys
import tempfile
from pathlib import Path

from megatron_distkv.cli.instance_arguments import add_instance_arguments
from megatron_distkv.cli.pool_arguments import default_ledger
from megatron_distkv.config.base import add_options, parse_config, read_config
from megatron_distkv.config.instance import InstanceConfig
from megatron_distkv.launch.commands import instance_command
from megatron_distkv.launch.processes import run_until_end


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, help="YAML or JSON file of an InstanceConfig; the options below win")
    add_instance_arguments(parser)
    parser.add_argument("--instance-id", help="unique in the pool")
    parser.add_argument("--run-dir", type=Path, help="where sockets lie; shared by the instances of a host")
    parser.add_argument("--tensor-parallel", type=int, help="ranks of this instance")
    parser.add_argument("--num-rblocks", type=int, help="rBlocks in this instance's pool")
    parser.add_argument("--num-host-rblocks", type=int, help="rBlocks in own host memory, used before borrowing")
    parser.add_argument("--num-lent-host-rblocks", type=int, help="rBlocks of host memory beside these, lent to others")
    parser.add_argument(
        "--ledger", metavar="URL", help=f"redis://, rediss:// or unix:// of the ledger server; else {default_ledger()}"
    )
    parser.add_argument(
        "--listen", metavar="tcp://HOST:PORT", help="lend to other hosts too; rank r listens at PORT + r"
    )
    parser.add_argument("--pool", help="name of the pool in the ledger")
    parser.add_argument("--launcher", choices=("deepspeed", "python"), default="deepspeed", help="how ranks start")


def run(args: argparse.Namespace) -> int:
    config = configuration(args)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", suffix=".json", prefix="distkv-") as file:
        file.write(config.model_dump_json())
        file.flush()
        return int(run_until_end(instance_command(config, Path(file.name), args.launcher)))


def configuration(args: argparse.Namespace) -> InstanceConfig:
    """The file's, and what the options add; raises ConfigError."""
    values = read_config(args.config) if args.config else {}
    top = {"model": args.model, "instance_id": args.instance_id, "run_dir": args.run_dir,
           "tensor_parallel": args.tensor_parallel, "deterministic": args.deterministic}  # fmt: skip
    values.update({key: value for key, value in top.items() if value is not None})
    values.setdefault("run_dir", Path(tempfile.gettempdir()) / "distkv")
    values.setdefault("ledger", {} if args.config else {"url": default_ledger()})
    nested = {
        "kv_cache": {
            "num_rblocks": args.num_rblocks,
            "num_host_rblocks": args.num_host_rblocks,
            "num_lent_host_rblocks": args.num_lent_host_rblocks,
            "dtype": args.kv_cache_dtype,
        },
        "lending": {"verify_one_in": args.verify},
        "ledger": {"url": args.ledger, "pool": args.pool},
        "network": {"listen": args.listen},
    }
    for room, settings in nested.items():
        add_options(values, room, settings)
    return parse_config(InstanceConfig, values, str(args.config or f"distkv {' '.join(sys.argv[1:2])}"))
