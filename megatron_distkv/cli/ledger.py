"""`distkv ledger`: the debt ledger for a person."""

import argparse
import time

from megatron_distkv.cli.pool_arguments import add_pool_arguments
from megatron_distkv.ledger import open_ledger, render_debts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_pool_arguments(parser)
    parser.add_argument("--events", type=int, default=0, metavar="N", help="also print the last N events")
    parser.add_argument("--watch", type=float, default=0.0, metavar="SECONDS", help="print again every SECONDS")


def run(args: argparse.Namespace) -> int:
    ledger = open_ledger(args.ledger, args.pool)
    while True:
        print(render_debts(ledger.snapshot()))
        for event in ledger.events(args.events) if args.events else []:
            print("  ".join(f"{key}={value}" for key, value in event.items()))
        if args.watch <= 0:
            return 0
        time.sleep(args.watch)
        print()
