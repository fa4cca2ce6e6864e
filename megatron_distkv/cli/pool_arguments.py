"""Arguments that every command of a running pool takes."""

import argparse
import os

# The one environment variable of the command line: where the ledger is, when --ledger is not given.
LEDGER_VARIABLE = "DISTKV_LEDGER"
DEFAULT_URL = "redis://127.0.0.1:6379/0"


def default_ledger() -> str:
    return os.environ.get(LEDGER_VARIABLE, DEFAULT_URL)


def add_pool_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ledger",
        default=default_ledger(),
        metavar="URL",
        help=f"redis://, rediss:// (TLS) or unix:// of the ledger server; ${LEDGER_VARIABLE} sets the default",
    )
    parser.add_argument("--pool", default="default", help="name of the pool in the ledger")
