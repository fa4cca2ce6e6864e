"""`distkv drain`: one instance takes nothing new, gives back what it lends, hands over what still runs, and ends."""

import argparse
import socket
import time

from tqdm import tqdm

from megatron_distkv import framing
from megatron_distkv.cli.pool_arguments import add_pool_arguments
from megatron_distkv.errors import LedgerUnavailable, UserError
from megatron_distkv.ledger import DebtLedger
from megatron_distkv.ledger.opening import open_ledger
from megatron_distkv.messages import DrainInstance
from megatron_distkv.pool import Member, picture_of
from megatron_distkv.rblock import InstanceId

LOOK_INTERVAL_S = 0.2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("instance", metavar="INSTANCE", help="as `distkv ledger` names it")
    add_pool_arguments(parser)
    parser.add_argument(
        "--within", type=float, default=300.0, metavar="SECONDS",
        help="what still runs then goes on in other instances, computed again from its tokens",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    ledger = open_ledger(args.ledger, args.pool)
    try:
        return _drain(ledger, args)
    except LedgerUnavailable as error:
        raise UserError(f"the ledger went away, {args.instance} goes on draining if it lives: {error}") from None
    finally:
        ledger.close()


def _drain(ledger: DebtLedger, args: argparse.Namespace) -> int:
    record = _find(ledger, args.instance)
    _tell(record, DrainInstance(args.within))
    most = record.local_used + record.lent
    with tqdm(desc=f"draining {args.instance}", unit="rBlock", total=most) as bar:
        while (now := ledger.snapshot().find(record.instance)) is not None and now.epoch == record.epoch:
            if now.lease_left_ms <= 0:
                raise UserError(f"{args.instance} has died before it was empty; its requests go on in other instances")
            left = now.local_used + now.lent
            bar.total = most = max(most, left)
            bar.update(most - left - bar.n)
            bar.set_postfix(requests=now.num_running + now.num_waiting, lent=now.lent)
            time.sleep(LOOK_INTERVAL_S)
    print(f"{args.instance} has left the pool")
    return 0


def _find(ledger: DebtLedger, name: str) -> Member:
    live = picture_of(ledger.snapshot()).live
    record = next((record for record in live if record.instance == InstanceId(name)), None)
    if record is None:
        names = ", ".join(record.instance for record in live) or "none"
        raise UserError(f"no live instance is called {name!r}; live are: {names}")
    if not record.takes_requests:
        raise UserError(
            f"{name} is a memory-only lender and serves no requests: send its process SIGTERM, and it gives back what "
            "it lends before it ends"
        )
    return record


def _tell(record: Member, message: DrainInstance) -> None:
    address = record.info.requests
    try:
        with socket.socket(socket.AF_UNIX) as door:
            door.connect(address)
            door.sendall(framing.pack(message))
    except OSError as error:
        raise UserError(f"{record.instance} cannot be reached at {address}: {error.strerror}") from None
