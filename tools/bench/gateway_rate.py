"""How many tokens pass through one gateway process on one core, and how late it is with each.

A real gateway, pinned to a core; an instance that computes nothing, on another core: each of its steps gives every
stream one token; and clients that read raw server-sent events, in this process. First as fast as it goes, then at a
given rate, when a token's delay counts from its instance's sending to its client's reading. Checked before anything is
reported: every stream has every token, in order.
"""

import argparse
import asyncio
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from megatron_distkv.clock import SystemClock
from megatron_distkv.config.instance import LedgerConfig
from megatron_distkv.engine.request_io import RequestIO
from megatron_distkv.kvcache.rblock_shape import RBlockShape
from megatron_distkv.ledger.embedded_server import EmbeddedServer
from megatron_distkv.ledger.opening import open_ledger
from megatron_distkv.messages import NewRequest, RequestKV, TokenOutput
from megatron_distkv.pool import Identity, MemberInfo, Membership
from megatron_distkv.rblock import InstanceId
from tools.bench.machine import describe_machine

SHAPE = RBlockShape(2, 4, 2, 16, 16, "fp32")
NUM_RBLOCKS = 1 << 20
VOCABULARY = 300  # bytes
TEXT = b"The quick brown fox jumps over the lazy dog. "
GATEWAY_CORE, OTHERS_CORE = 0, 1


class Load(NamedTuple):
    num_streams: int
    num_tokens: int  # of each
    tokens_per_s: float  # of all; infinity: as fast as it goes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=300, help="of each stream")
    parser.add_argument("--rate", type=float, default=5000.0, help="tokens/s of all streams, for the delays")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the report there")
    args = parser.parse_args()
    os.sched_setaffinity(0, {OTHERS_CORE})
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(EmbeddedServer())
        instance = PretendedInstance(directory / "requests.sock", server.url)
        stack.callback(instance.close)
        port = stack.enter_context(_Gateway(server.url)).port
        fastest, delays = [], []
        for _ in range(args.runs):
            instance.load = Load(args.streams, args.tokens, float("inf"))
            fastest.append(asyncio.run(_run(port, instance)).tokens_per_s)
            instance.load = Load(args.streams, args.tokens, args.rate)
            delays.append(asyncio.run(_run(port, instance)))
    report = {
        "machine": describe_machine(),
        "config": {name: getattr(args, name) for name in ("streams", "tokens", "rate", "runs")},
        "tokens_per_s": statistics.median(fastest),
        "all_tokens_per_s": fastest,
        "delay_ms": {name: statistics.median(getattr(x, name) for x in delays) for name in ("p50_ms", "p99_ms")},
        "all_p99_ms": [x.p99_ms for x in delays],
    }
    print(report["machine"])
    print(", ".join(f"{name} {value}" for name, value in report["config"].items()))
    print(f"as fast as it goes: {report['tokens_per_s']:.0f} tokens/s ({min(fastest):.0f} to {max(fastest):.0f})")
    p50, p99 = report["delay_ms"].values()
    print(f"at {args.rate:.0f} tokens/s: delay {p50:.1f} ms, p99 {p99:.1f} ms ({report['all_p99_ms']})")
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1))


class _Gateway:
    """A real one, on a core of its own."""

    def __init__(self, ledger_url: str) -> None:
        command = ["taskset", "-c", str(GATEWAY_CORE), sys.executable, "-m", "megatron_distkv.cli.main", "gateway"]
        options = ["--ledger", ledger_url, "--port", "0", "--max-queued-requests", "4096"]
        self._process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline().rpartition(":")[2].removesuffix("/v1\n"))

    def __enter__(self) -> "_Gateway":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()


class PretendedInstance:
    """In threads of this process: takes what `load` says, then gives each stream a token per step."""

    def __init__(self, socket: Path, ledger_url: str) -> None:
        self.load = Load(0, 0, 0.0)
        self.sent_s: list[float] = []  # of each step
        self._io = RequestIO(socket)
        self._has_ended = threading.Event()
        info = MemberInfo(shape=SHAPE, requests=str(socket), vocab_size=VOCABULARY)
        identity = Identity(InstanceId("pretended"))
        self._membership = Membership(
            open_ledger(ledger_url, "default"), identity, LedgerConfig(url=ledger_url), "", NUM_RBLOCKS, 0, info,
            SystemClock(),
        )  # fmt: skip
        self._membership.join()
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._beat, self._serve)]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        self._has_ended.set()
        for thread in self._threads:
            thread.join()
        self._io.close()
        self._membership.leave()

    def _beat(self) -> None:
        while not self._has_ended.wait(0.5):
            self._membership.beat()

    def _serve(self) -> None:
        running: dict[str, int] = {}
        while not self._has_ended.is_set():
            while not self._io.inbox.empty():
                client, message = self._io.inbox.get()
                if isinstance(message, NewRequest):
                    running[message.request_id] = client
            if running and len(running) == self.load.num_streams:
                self._answer(running)
                running = {}
            time.sleep(0.001)

    def _answer(self, running: dict[str, int]) -> None:
        load, client = self.load, next(iter(running.values()))
        self.sent_s = []
        interval_s = load.num_streams / load.tokens_per_s
        start_s = time.monotonic()
        for step in range(load.num_tokens):
            time.sleep(max(0.0, start_s + step * interval_s - time.monotonic()))
            is_last = step + 1 == load.num_tokens
            token = TEXT[step % len(TEXT)]
            self.sent_s.append(time.monotonic())
            reason, kv = ("length", RequestKV()) if is_last else (None, None)
            self._io.send(client, [TokenOutput(x, [token], finish_reason=reason, kv=kv) for x in running])


class Measured(NamedTuple):
    tokens_per_s: float
    p50_ms: float
    p99_ms: float


async def _run(port: int, instance: PretendedInstance) -> Measured:
    load = instance.load
    streams = await asyncio.gather(*(_read(port, load.num_tokens) for _ in range(load.num_streams)))
    sent_s = instance.sent_s
    delays_s = sorted(read - sent for times in streams for read, sent in zip(times, sent_s, strict=True))
    duration_s = max(times[-1] for times in streams) - sent_s[0]
    return Measured(
        load.num_streams * load.num_tokens / duration_s,
        1e3 * delays_s[len(delays_s) // 2],
        1e3 * delays_s[len(delays_s) * 99 // 100],
    )


async def _read(port: int, num_tokens: int) -> list[float]:
    """When each token came; raises SystemExit where one is missing, or another."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = json.dumps({"prompt": "x", "max_tokens": num_tokens, "stream": True, "temperature": 0.0}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    writer.write(head + b"Content-Length: %d\r\nConnection: close\r\n\r\n" % len(body) + body)
    came_s: list[float] = []
    data = b""
    events: list[bytes] = []
    while piece := await reader.read(1 << 16):
        now_s = time.monotonic()
        data += piece
        *whole, data = data.split(b"\n\n")
        new = [line for event in whole for line in event.splitlines() if line.startswith(b"data: {")]
        events += new
        came_s += [now_s] * len(new)
    writer.close()
    text = b"".join(json.loads(event[6:])["choices"][0]["text"].encode() for event in events)
    if text != bytes(itertools.islice(itertools.cycle(TEXT), num_tokens)) or len(came_s) != num_tokens:
        raise SystemExit(f"a stream has other tokens than it was given: nothing to report ({text[:80]!r})")
    return came_s


if __name__ == "__main__":
    main()
