"""What must be nothing after the last fault and the last request: debts, rBlocks in use, processes, files."""

import time
from pathlib import Path

from tools.bench.chaos.pool import Pool

SETTLED_WITHIN_S = 60.0


def unsettled(pool: Pool) -> list[str]:
    """What is still owed or used once nobody asks any more."""
    end_s = time.monotonic() + SETTLED_WITHIN_S
    while True:
        wrong = _wrong(pool)
        if not wrong or time.monotonic() > end_s:
            return wrong
        time.sleep(0.2)


def _wrong(pool: Pool) -> list[str]:
    snapshot = pool.cluster.ledger.snapshot()
    wrong = [f"loan {loan.key}" for loan in snapshot.loans]
    wrong += [f"{x.instance} uses {x.local_used}, lends {x.lent}" for x in snapshot.instances if x.local_used or x.lent]
    members, live = sorted([*pool.instance_ids, *pool.lender_ids]), sorted(x.instance for x in snapshot.live)
    if live != members:
        wrong.append(f"{', '.join(live) or 'nobody'} live, not {', '.join(members)}")
    return wrong + [f"{name} has ended: {pool.child(name).error_line()}" for name in pool.dead_parts()]


def left_behind(scratch: Path, mark: str) -> list[str]:
    """Processes and files that outlive the pool. `mark`: a line of the environment that all its processes have."""
    processes = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in path.read_bytes().split(b"\0"):
                processes.append(f"process {path.parent.name}")
        except OSError:
            continue
    files = [f"file {path.name}" for path in scratch.iterdir() if path.name.startswith("distkv")]
    return processes + files
