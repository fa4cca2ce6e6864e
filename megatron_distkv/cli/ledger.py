"""`distkv ledger`: the debt ledger for a person, now and as history, and whether its books are in order."""

import argparse
import socket
import struct
import time
from collections.abc import Callable

from megatron_distkv import framing
from megatron_distkv.cli.pool_arguments import add_pool_arguments
from megatron_distkv.errors import LedgerUnavailable, UnreadableMessage, UserError
from megatron_distkv.ledger import DebtLedger, render_history
from megatron_distkv.ledger.opening import open_ledger
from megatron_distkv.messages import InstanceStatus, StatusQuery, decode
from megatron_distkv.pool import Member, check_instance, check_picture, picture_of, render_debts

# Instances and ledger speak twice a second: books that differ for longer than this stay different.
SETTLED_WITHIN_S = 3.0
LOOK_AGAIN_S = 0.3
ANSWER_TIMEOUT_S = 5.0
_EVERYTHING = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_pool_arguments(parser)
    parser.add_argument("--events", type=int, default=0, metavar="N", help="also print the last N events")
    parser.add_argument("--history", action="store_true", help="print what happened, oldest first, and nothing else")
    parser.add_argument(
        "--check", action="store_true", help="compare loans, records and instances; exit 1 and name what disagrees"
    )
    parser.add_argument("--watch", type=float, default=0.0, metavar="SECONDS", help="print again every SECONDS")


def run(args: argparse.Namespace) -> int:
    ledger = open_ledger(args.ledger, args.pool)
    try:
        return _run(ledger, args)
    except LedgerUnavailable as error:
        raise UserError(f"the ledger went away: {error}") from None
    finally:
        ledger.close()


def _run(ledger: DebtLedger, args: argparse.Namespace) -> int:
    if args.check:
        return _check(lambda: _disagreements(ledger))
    while True:
        if args.history:
            print(render_history(ledger.events(args.events or _EVERYTHING)))
        else:
            print(render_debts(picture_of(ledger.snapshot())))
            if args.events:
                print(render_history(ledger.events(args.events)))
        if args.watch <= 0:
            return 0
        time.sleep(args.watch)
        print()


def _check(disagreements: Callable[[], list[str]]) -> int:
    """Loans come and go while we look: only what disagrees again and again is wrong."""
    end_s = time.monotonic() + SETTLED_WITHIN_S
    wrong = disagreements()
    while wrong and time.monotonic() < end_s:
        time.sleep(LOOK_AGAIN_S)
        now = disagreements()
        wrong = [sentence for sentence in wrong if sentence in now]
    for sentence in wrong:
        print(sentence)
    if not wrong:
        print("the books are in order")
    return 1 if wrong else 0


def _disagreements(ledger: DebtLedger) -> list[str]:
    picture = picture_of(ledger.snapshot())
    found = check_picture(picture)
    for record in (x for x in picture.live if x.takes_requests):  # a lender has no accounts to be asked for
        try:
            found += check_instance(record, _ask(record))
        except (OSError, UnreadableMessage) as error:
            found.append(f"{record.instance} does not answer: {error}")
    return found


def _ask(record: Member) -> InstanceStatus:
    """The instance's own accounts, over its request socket on this host."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(ANSWER_TIMEOUT_S)
        connection.connect(record.info.requests)
        connection.sendall(framing.pack(StatusQuery(1)))
        (size,) = struct.unpack(">I", _receive(connection, 4))
        return decode(_receive(connection, min(size, framing.MAX_MESSAGE_BYTES)), InstanceStatus)


def _receive(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = connection.recv(size - len(data))
        if not piece:
            raise ConnectionError("it closed the connection")
        data += piece
    return data
