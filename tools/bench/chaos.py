"""A pool under mixed traffic while its parts are killed, hung and restarted at random.

Checks first, then reports: every answer is compared with that of one instance with enough memory; after the last
fault nothing may be owed, used or left behind. Exit status 0 only if nothing was lost, wrong or leaked.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from megatron_distkv.launch.local_cluster import LocalCluster
from tqdm import tqdm

from megatron_distkv.config.cluster import ClusterConfig
from tests.model.llamas import save_llama
from tools.bench.chaos_faults import Faults
from tools.bench.chaos_report import as_markdown
from tools.bench.chaos_traffic import Traffic, questions, reference_answers, reference_config
from tools.bench.machine import describe_machine

NUM_RBLOCKS, RBLOCK_SIZE = 24, 8
NUM_QUESTIONS = 16
MARK = "DISTKV_CHAOS_RUN"
SETTLED_WITHIN_S = 60.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0, help="of faults")
    parser.add_argument("--seed", type=int, default=None, help="of traffic and faults; default: drawn and printed")
    parser.add_argument("--instances", type=int, default=4, help="serving instances")
    parser.add_argument("--lenders", type=int, default=1, help="memory-only lenders")
    parser.add_argument("--clients", type=int, default=6, help="requests at one time")
    parser.add_argument("--mean-gap-s", type=float, default=2.5, help="mean time between two faults")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the report there")
    args = parser.parse_args()
    seed = args.seed if args.seed is not None else random.SystemRandom().randrange(10**6)
    os.environ[MARK] = uuid.uuid4().hex
    with tempfile.TemporaryDirectory(prefix="chaos-") as scratch:
        tempfile.tempdir = os.environ["TMPDIR"] = scratch
        report = run(args, seed, Path(scratch))
        report["leaks"] += left_behind(Path(scratch))
    print(json.dumps(report, indent=1))
    print(as_markdown([report]))
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1))
    return 1 if report["lost"] or report["mismatches"] or report["leaks"] else 0


def run(args: argparse.Namespace, seed: int, scratch: Path) -> dict[str, Any]:
    rng = random.Random(seed)
    model = save_llama(scratch / "model", vocab_size=272)
    longest = int(1.6 * NUM_RBLOCKS * RBLOCK_SIZE)
    asked = questions(rng, NUM_QUESTIONS, longest)
    print(f"seed {seed}; {describe_machine()}", flush=True)
    with ExitStack() as stack:
        # Computed while the pool starts, which is mostly waiting for it.
        beside = stack.enter_context(ThreadPoolExecutor(1))
        reference = beside.submit(reference_answers, asked, reference_config(model, scratch, RBLOCK_SIZE, longest))
        cluster = stack.enter_context(LocalCluster(cluster_config(model, args.instances, args.lenders)))
        answers = reference.result()
        faults = Faults(cluster, rng)
        with Traffic(cluster.base_url, asked, answers, args.clients, seed) as traffic:
            inject(faults, rng, args.minutes * 60, args.mean_gap_s)
            cluster.wait_for([*cluster.instance_ids, *cluster.lender_ids, "gmanager"])
        leaks = faults.crashed + unsettled(cluster)
    return {
        "requests": traffic.tally.requests,
        "lost": sum(traffic.tally.lost.values()),
        "mismatches": traffic.tally.mismatches,
        "leaks": leaks,
        "faults": dict(faults.counts),
        "recomputed_tokens": traffic.tally.recomputed_tokens,
        "full_recompute_tokens": traffic.tally.full_recompute_tokens,
        "longest_pause_s": round(traffic.tally.longest_pause_s, 2),
        "tokens": traffic.tally.tokens,
        "left_by_client": traffic.tally.left,
        "refused": dict(traffic.tally.refused),
        "refused_why": traffic.tally.refusals,
        "lost_why": dict(traffic.tally.lost),
        "seed": seed,
        "minutes": args.minutes,
        "clients": args.clients,
        "machine": describe_machine(),
        "cluster": cluster.config.model_dump(mode="json", exclude={"model"}),
    }


def cluster_config(model: Path, instances: int, lenders: int) -> ClusterConfig:
    return ClusterConfig.model_validate(
        {
            "model": model, "instances": instances, "launcher": "python", "port": 0,
            "lenders": lenders, "lender_rblocks": NUM_RBLOCKS,
            "kv_cache": {"num_rblocks": NUM_RBLOCKS, "rblock_size": RBLOCK_SIZE},
            "scheduler": {"max_batched_tokens": 64},
            "ledger": {"url": "embedded://", "heartbeat_interval_s": 0.1, "lease_s": 3.0},
            "lending": {"deadline_s": 2.0},
        }
    )  # fmt: skip


def inject(faults: Faults, rng: random.Random, for_s: float, mean_gap_s: float) -> None:
    end_s = time.monotonic() + for_s
    next_s = time.monotonic() + mean_gap_s
    with tqdm(total=round(for_s), desc="faults", unit="s") as bar:
        while time.monotonic() < end_s:
            time.sleep(0.05)
            faults.repair()
            if time.monotonic() >= next_s:
                faults.break_something()
                next_s = time.monotonic() + rng.expovariate(1 / mean_gap_s)
            bar.update(round(for_s - (end_s - time.monotonic())) - bar.n)
    faults.finish()


def unsettled(cluster: LocalCluster) -> list[str]:
    """What is still owed or used once nobody asks any more."""
    end_s = time.monotonic() + SETTLED_WITHIN_S
    while True:
        snapshot = cluster.ledger.snapshot()
        wrong = [f"loan {loan.key}" for loan in snapshot.loans]
        wrong += [
            f"{x.instance} uses {x.local_used}, lends {x.lent}" for x in snapshot.instances if x.local_used or x.lent
        ]
        members = [*cluster.instance_ids, *cluster.lender_ids]
        if sorted(x.instance for x in snapshot.live) != sorted(members):
            wrong.append(f"{len(snapshot.live)} members live, not {len(members)}")
        wrong += [f"{name} has ended: {cluster.child(name).error_line()}" for name in cluster.dead_parts()]
        if not wrong or time.monotonic() > end_s:
            return wrong
        time.sleep(0.2)


def left_behind(scratch: Path) -> list[str]:
    """Processes and files that outlive the pool."""
    mark = f"{MARK}={os.environ[MARK]}".encode()
    processes = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark in path.read_bytes().split(b"\0"):
                processes.append(f"process {path.parent.name}")
        except OSError:
            continue
    files = [f"file {path.name}" for path in scratch.iterdir() if path.name.startswith("distkv")]
    return processes + files


if __name__ == "__main__":
    sys.exit(main())
