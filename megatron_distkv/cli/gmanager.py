"""`distkv gmanager`: the planner of a pool."""

import argparse
import os
import signal
import socket
import threading

from megatron_distkv.cli.pool_arguments import add_pool_arguments
from megatron_distkv.gmanager import GManager
from megatron_distkv.ledger.opening import open_ledger
from megatron_distkv.log import setup_logging


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_pool_arguments(parser)
    parser.add_argument("--interval", type=float, default=1.0, metavar="SECONDS", help="time between two plans")


def run(args: argparse.Namespace) -> int:
    setup_logging("gmanager")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    candidate = f"{socket.gethostname()}:{os.getpid()}"
    manager = GManager(open_ledger(args.ledger, args.pool), candidate, args.interval)
    print("READY gmanager", flush=True)
    manager.run(stop)
    return 0
