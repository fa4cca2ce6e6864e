"""A pool under mixed traffic while its parts are killed, hung, starved and restarted at random.

Checks first, then reports: every answer is compared with that of one instance with enough memory, tokens and
log-probabilities; no process may keep more with every request; after the last fault nothing may be owed, used or left
behind. Exit status 0 only if nothing was lost, wrong or leaked, and every fault survived.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any

from tools.bench.chaos import seam
from tools.bench.chaos.faults import KINDS
from tools.bench.chaos.report import as_markdown
from tools.bench.chaos.run import run
from tools.bench.chaos.settling import left_behind
from tools.bench.machine import describe_machine

MARK = "DISTKV_CHAOS_RUN"
# What this tool must see.
INJECTIONS = ("tools.bench.chaos.leak", "tools.bench.chaos.scaled_partials")


def main() -> int:
    args = _arguments()
    seed = args.seed if args.seed is not None else random.SystemRandom().randrange(10**6)
    os.environ[MARK] = uuid.uuid4().hex
    print(f"seed {seed}; {describe_machine()}", flush=True)
    with tempfile.TemporaryDirectory(prefix="chaos-") as directory:
        scratch = Path(directory)
        tempfile.tempdir = os.environ["TMPDIR"] = directory
        if args.inject is not None:
            os.environ.update(seam.environment(args.inject, scratch / "seam"))
        report = run(args, seed, scratch)
        report["leaks"] += left_behind(scratch, f"{MARK}={os.environ[MARK]}")
    print(json.dumps(report, indent=1))
    print(as_markdown([report]))
    print(_verdict(report))
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1))
    return 1 if _is_wrong(report) else 0


def _is_wrong(report: dict[str, Any]) -> bool:
    return any(report[key] for key in ("lost", "mismatches", "leaks", "failures"))


def _verdict(report: dict[str, Any]) -> str:
    differ = f"{report['mismatches']} of {report['answers']} answers differ"
    why = ", ".join(f"{count} in {what}" for what, count in report["differences"].items())
    words = [f"{report['lost']} of {report['requests']} requests were lost", differ + (f" ({why})" if why else "")]
    return "\n".join([*words, *report["leaks"], *report["failures"]])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--minutes", type=float, default=1.0, help="of faults")
    add("--min-requests", type=int, default=100, help="longer than --minutes until so many were asked, within bounds")
    add("--seed", type=int, default=None, help="of traffic and faults; default: drawn and printed")
    add("--instances", type=int, default=4, help="serving instances")
    add("--lenders", type=int, default=1, help="memory-only lenders")
    add("--clients", type=int, default=6, help="requests at one time")
    add("--kv-cache-dtype", choices=("auto", "int8"), default="auto", help="of the pool and of its reference")
    add("--mean-gap-s", type=float, default=2.5, help="mean time between two faults")
    add("--faults", type=_kinds, default=list(KINDS), metavar="KINDS", help=f"comma-separated; all: {', '.join(KINDS)}")
    add("--without", type=_kinds, default=[], metavar="KINDS", help="of --faults, leave these out")
    add(
        "--inject",
        metavar="MODULE",
        help=f"run every part with the PATCHES of this module, as {' or '.join(INJECTIONS)}",
    )
    add("--json", type=Path, metavar="FILE", help="also write the report there")
    args = parser.parse_args()
    args.faults = [kind for kind in args.faults if kind not in args.without]
    return args


def _kinds(words: str) -> list[str]:
    """ "none" is none of them."""
    kinds = [] if words == "none" else words.split(",")
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no fault is called {unknown[0]!r}; there are: {', '.join(KINDS)}")
    return kinds


if __name__ == "__main__":
    sys.exit(main())
