"""One run: a pool, its clients and its faults, and the report of what came of them."""

import argparse
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tests.model.llamas import save_llama
from tools.bench.chaos.faults import TICK_S, Faults
from tools.bench.chaos.gateways import Gateways
from tools.bench.chaos.pool import NUM_RBLOCKS, RBLOCK_SIZE, Pool
from tools.bench.chaos.processes import Processes
from tools.bench.chaos.questions import LOGPROB_TOLERANCE, answered, questions, reference_config
from tools.bench.chaos.scene import Scene
from tools.bench.chaos.settling import unsettled
from tools.bench.chaos.traffic import Traffic
from tools.bench.machine import describe_machine

NUM_QUESTIONS = 16
# A machine with much other work may need that many times the minutes for the requests.
AT_MOST_TIMES = 8


def run(args: argparse.Namespace, seed: int, scratch: Path) -> dict[str, Any]:
    rng = random.Random(seed)
    model = save_llama(scratch / "model", vocab_size=272)
    longest = int(1.6 * NUM_RBLOCKS * RBLOCK_SIZE)
    drawn = questions(rng, NUM_QUESTIONS, longest)
    config = reference_config(model, scratch, RBLOCK_SIZE, longest, args.kv_cache_dtype)
    with ExitStack() as stack:
        # Computed while the pool starts, which is mostly waiting for it.
        beside = stack.enter_context(ThreadPoolExecutor(1))
        reference = beside.submit(answered, rng, drawn, config)
        pool = stack.enter_context(Pool(model, args.instances, args.lenders, args.kv_cache_dtype, scratch))
        gateways = Gateways(pool.gateways)
        scene = Scene(pool, gateways)
        faults = Faults(scene, args.faults, seed)
        tolerance = LOGPROB_TOLERANCE[args.kv_cache_dtype]
        traffic = Traffic(gateways, reference.result(), args.clients, seed, tolerance)
        traffic.tally.expect(gateways.base_urls, pool.instance_ids)
        with Processes(pool, traffic.tally.num_requests_of) as processes, traffic:
            tally = traffic.tally
            _inject(
                faults,
                random.Random(f"{seed} gaps"),
                args.minutes * 60,
                args.mean_gap_s,
                lambda: tally.requests >= args.min_requests,
            )
        leaks = faults.crashed + processes.leaks() + unsettled(pool)
        if not processes.has_judged(pool.instance_ids):
            leaks.append("whether an instance leaks is not known: none lived for enough requests; give more minutes")
    return {**_of_traffic(traffic), **_of_faults(scene, leaks), **_of_processes(processes),
            "seed": seed, "minutes": args.minutes, "clients": args.clients, "inject": args.inject,
            "machine": describe_machine(),
            "cluster": pool.config.model_dump(mode="json", exclude={"model"})}  # fmt: skip


def _inject(
    faults: Faults, rng: random.Random, for_s: float, mean_gap_s: float, has_enough: Callable[[], bool]
) -> None:
    """For that long, and on a slow machine until the clients have asked enough, within bounds."""
    latest_s = time.monotonic() + AT_MOST_TIMES * for_s
    end_s = time.monotonic() + for_s
    next_s = time.monotonic() + mean_gap_s
    with tqdm(total=round(for_s), desc="faults", unit="s") as bar:
        while time.monotonic() < (end_s if has_enough() else latest_s):
            time.sleep(TICK_S)
            faults.tick()
            if time.monotonic() >= next_s:
                faults.break_something()
                next_s = time.monotonic() + rng.expovariate(1 / mean_gap_s)
            bar.update(min(round(for_s), round(for_s - (end_s - time.monotonic()))) - bar.n)
    faults.finish()


def _of_traffic(traffic: Traffic) -> dict[str, Any]:
    tally = traffic.tally
    return {
        "requests": tally.requests,
        "streamed": tally.streamed,
        "answers": tally.answers,
        "lost": sum(tally.lost.values()),
        "mismatches": tally.mismatches,
        "differences": dict(tally.differences),
        "logprobs": tally.logprobs,
        "logprob_tolerance": tally.logprob_tolerance,
        "greatest_logprob_error": tally.greatest_logprob_error,
        "recomputed_tokens": tally.recomputed_tokens,
        "full_recompute_tokens": tally.full_recompute_tokens,
        "longest_pause_s": round(tally.longest_pause_s, 2),
        "tokens": tally.tokens,
        "left_by_client": tally.left,
        "retried": tally.retried,
        "refused": dict(tally.refused),
        "refused_why": tally.refusals,
        "lost_why": dict(tally.lost),
    }


def _of_faults(scene: Scene, leaks: list[str]) -> dict[str, Any]:
    failures = [f"{kind}: {sentence}" for kind, sentence in scene.failures]
    return {"faults": dict(scene.counts), "leaks": leaks, "failures": failures}


def _of_processes(processes: Processes) -> dict[str, Any]:
    return {
        "lives": processes.num_lives,
        "lives_judged": processes.num_judged,
        "growth": processes.greatest_growth(),
    }
