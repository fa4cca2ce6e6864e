"""What a ledger far away costs: six growing requests on two instances and a lender, at several round trips.

Streams first, checks that every answer has its tokens and that the tokens are the same at every distance, then reports:
the time for all, the worst gap between two tokens, and that of short ones beside them, which borrow nothing.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from megatron_distkv.launch.local_cluster import LocalCluster

from megatron_distkv.config.cluster import ClusterConfig
from megatron_distkv.ledger.embedded_server import EmbeddedServer
from tests.model.llamas import save_llama
from tools.bench.chaos.ledger_line import LedgerLine
from tools.bench.machine import describe_machine

PROMPT, OUTPUT, NUM_REQUESTS = 200, 40, 6
SHORT = 8  # tokens, of prompt and answer: one rBlock of 16
SETTLED_S = 2.0


@dataclass
class Stream:
    """One answer: its tokens and when each came."""

    token_ids: list[int] = field(default_factory=list)
    at_s: list[float] = field(default_factory=list)
    borrowed: int = 0

    @property
    def gaps_ms(self) -> list[float]:
        return [1000 * (b - a) for a, b in zip(self.at_s, self.at_s[1:], strict=False)]


async def stream(client: httpx.AsyncClient, url: str, prompt: Sequence[int], max_tokens: int) -> Stream:
    body = {"model": "distkv", "prompt": list(prompt), "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True,
            "stream": True, "return_token_ids": True, "stream_options": {"include_usage": True}}  # fmt: skip
    found = Stream()
    async with client.stream("POST", f"{url}/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            ids = [x for choice in event["choices"] for x in choice["token_ids"]]
            if ids:
                found.token_ids += ids
                found.at_s.append(time.perf_counter())
            if event.get("usage"):
                found.borrowed = sum(event["usage"]["kv"][0]["max_borrowed_rblocks"].values())
    return found


async def short_ones(client: httpx.AsyncClient, url: str, prompt: Sequence[int], done: asyncio.Event) -> Stream:
    """One after the other, each within one rBlock; the one with the worst gap."""
    worst = await stream(client, url, prompt, SHORT)
    while not done.is_set():
        worst = max(worst, await stream(client, url, prompt, SHORT), key=lambda one: max(one.gaps_ms))
    return worst


async def ask(url: str, seed: int) -> tuple[float, list[Stream], Stream]:
    """Seconds for the growing ones, these, and the short ones beside them."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(32, 127) for _ in range(PROMPT)] for _ in range(NUM_REQUESTS)]
    async with httpx.AsyncClient(timeout=200) as client:
        began_s = time.perf_counter()
        done = asyncio.Event()
        beside = asyncio.create_task(short_ones(client, url, prompts[0][:SHORT], done))
        streams = await asyncio.gather(*(stream(client, url, prompt, OUTPUT) for prompt in prompts))
        took_s = time.perf_counter() - began_s
        done.set()
        return took_s, streams, await beside


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--round-trips-ms", type=float, nargs="+", default=[0, 10, 50, 100, 300, 0])
    parser.add_argument("--repeats", type=int, default=3, help="of each; medians are printed")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    print(f"seed {args.seed}; {describe_machine()}")
    expected: list[list[int]] | None = None
    with tempfile.TemporaryDirectory(prefix="far-") as scratch, EmbeddedServer() as server:
        model = save_llama(Path(scratch) / "model", vocab_size=272)
        with (
            LedgerLine(Path(scratch) / "line.sock", server.url) as line,
            LocalCluster(_config(model, line.url)) as pool,
        ):
            for round_trip_ms in args.round_trips_ms:
                line.delay(round_trip_ms / 2000)
                runs = []
                for _ in range(args.repeats):
                    time.sleep(SETTLED_S + 4 * round_trip_ms / 1000)  # what was borrowed before is back
                    runs.append(asyncio.run(ask(pool.base_url, args.seed)))
                    got = [x.token_ids for x in runs[-1][1]]
                    expected = expected or got
                    if got != expected or any(len(x) != OUTPUT for x in got):
                        print("WRONG: other tokens than without a delay")
                        return 1
                _report(round_trip_ms, runs)
    return 0


def _config(model: Path, ledger_url: str) -> ClusterConfig:
    return ClusterConfig.model_validate(
        {
            "model": model, "instances": 2, "launcher": "python", "port": 0, "lenders": 1, "lender_rblocks": 128,
            "kv_cache": {"num_rblocks": 16, "rblock_size": 16}, "ledger": {"url": ledger_url},
        }
    )  # fmt: skip


def _report(round_trip_ms: float, runs: list[tuple[float, list[Stream], Stream]]) -> None:
    times = sorted(took_s for took_s, _, _ in runs)
    worst = [max(gap for x in streams for gap in x.gaps_ms) for _, streams, _ in runs]
    beside = [max(x.gaps_ms) for _, _, x in runs]
    borrowed = statistics.median(sum(x.borrowed for x in streams) for _, streams, _ in runs)
    print(
        f"round trip {round_trip_ms:5.0f} ms: {statistics.median(times):6.2f} s ({times[0]:.2f} to {times[-1]:.2f}), "
        f"worst gap {statistics.median(worst):6.0f} ms, of short ones that borrow nothing "
        f"{statistics.median(beside):6.0f} ms; {borrowed:.0f} rBlocks borrowed",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
