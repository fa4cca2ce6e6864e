"""The kernels against this machine's ceilings: decode, prefill, merge, store, moves, and what a call costs.

Every answer is checked against float64 first; a wrong one ends the run. rBlocks lie in random order in a pool of at
least four times the last-level cache; the ceiling is measured in turn with the work. Figures are medians; shares and
ratios are medians over the rounds. With one thread times are this thread's CPU time, with more they are wall time.
usage: python -m tools.bench.micro_attention [--threads 1] [--only decode] [--json FILE] [--vllm-python PATH]
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from megatron_distkv.kernels import cpu

from megatron_distkv.attention.rotary import RotaryConfig, rotary_table
from megatron_distkv.ops import (
    apply_rope,
    backend_in_use,
    gather_rblocks,
    instruction_set,
    merge,
    merge_out,
    micro_attention_out,
    store_kv,
)
from tools.bench.ceilings import Work, in_turn, matrix_product, median_ratio, read_probe
from tools.bench.machine import describe_machine
from tools.bench.rblock_sequence import LAYER, SIZE, Sequence, Shape, cache_bytes, pool_pages
from tools.bench.vllm_peer import VllmPeer
from tools.bench.wanted import attention_in_float64, check

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
torch_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
VLLM_TOLERANCE = 1e-2  # its results are bf16
TOLERANCES = {torch.bfloat16: 4e-3, torch.float32: 1e-5}


class Figure(NamedTuple):
    work: str
    device: str
    threads: int
    value: float
    unit: str
    ceiling: float
    share: float
    peers: dict[str, float]


class Run(NamedTuple):
    """How it is measured: `vllm` is a peer where its Python was given."""

    threads: int
    runs: int
    vllm: VllmPeer | None = None

    def peers(
        self,
        q_THD: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        rows: torch.Tensor,
        wanted: tuple[torch.Tensor, torch.Tensor],
    ) -> dict[str, Work]:
        """vLLM's op over the same q, k and v `[1, K, X, D]`, its answer checked in these rows of the queries."""
        if self.vllm is None:
            return {}
        out = self.vllm.prepare(q_THD, k[0].transpose(0, 1), v[0].transpose(0, 1))
        check((out[rows], wanted[1]), wanted, VLLM_TOLERANCE)  # it gives no LSE
        return {"vLLM's op": self.vllm.work}


def decode(run: Run) -> Iterator[Figure]:
    cases = [("bf16", 8, 4, 128), ("bf16", 8, 8, 128), ("bf16", 8, 1, 128), ("bf16", 1, 16, 128), ("fp32", 8, 4, 128)]
    for name, kv_heads, group, head_dim in cases:
        for context in (32768, 65536) if group == 4 and name == "bf16" else (32768 * 8 // kv_heads,):
            case = Sequence(Shape(kv_heads, group, head_dim, DTYPES[name]), context, 1, cache_bytes() * 4)
            k, v = case.dense_kv()
            wanted = attention_in_float64(case.q, k, v, case.positions, case.scale)
            check(case.attend(), wanted, TOLERANCES[k.dtype])
            has_peer = name == "bf16" and group == 4
            peers = run.peers(case.q, k, v, torch.arange(1), wanted) if has_peer else {}
            folded = case.q.view(1, kv_heads, group, head_dim)
            times = in_turn(
                {
                    "ours": case.attend,
                    "ceiling": read_probe(case.pool, LAYER, case.ids, run.threads),
                    "torch flash, dense KV": lambda q=folded, k=k, v=v: torch_flash(q, k, v),
                    **peers,
                },
                run.threads,
                run.runs,
            )
            work = f"decode {name} kv {kv_heads} group {group} D {head_dim} context {context}"
            yield figure(work, run.threads, times, case.bytes_read / 1e9, "GB/s")


def int8(run: Run) -> Iterator[Figure]:
    """Against bf16 in the same rounds: the ratio is that of tokens per second. The ceiling is that of int8's bytes."""
    case = Sequence(Shape(8, 4, 128, torch.bfloat16), 32768, 1, cache_bytes() * 4)
    pool = case.int8_pool()
    k, v = case.dense_kv()
    wanted, _ = attention_in_float64(case.q, k, v, case.positions, case.scale)
    error = float((case.attend_int8(pool)[0] - wanted).norm() / wanted.norm())
    if error > 1e-2:
        raise SystemExit(f"wrong answer: int8 decode, error {error:.1e}")
    works: dict[str, Work] = {
        "ours": lambda: case.attend_int8(pool),
        "ceiling": read_probe(pool[0], LAYER, case.ids, run.threads),
        "ours in bf16": case.attend,
    }
    times = in_turn(works, run.threads, run.runs)
    work = f"decode int8 kv 8 group 4 D 128 context 32768, error {error:.1e}"
    yield figure(work, run.threads, times, case.bytes_read / 2 / 1e9, "GB/s")


def prefill(run: Run) -> Iterator[Figure]:
    for name, chunk in (("bf16", 2048), ("bf16", 8192), ("fp32", 2048)):
        kv_heads, group, head_dim = 2, 4, 128
        case = Sequence(Shape(kv_heads, group, head_dim, DTYPES[name]), chunk, chunk)
        k, v = case.dense_kv()
        rows = torch.arange(0, chunk, 37)
        wanted = attention_in_float64(case.q[rows], k, v, rows, case.scale)
        out, lse = case.attend()
        check((out[rows], lse[rows]), wanted, TOLERANCES[k.dtype])
        peers = run.peers(case.q, k, v, rows, wanted) if name == "bf16" else {}
        q, wide_k, wide_v = case.q.transpose(0, 1)[None], *(x.repeat_interleave(group, 1) for x in (k, v))
        product, operations = matrix_product(DTYPES[name])
        times = in_turn(
            {
                "ours": case.attend,
                "ceiling": product,
                "torch sdpa, dense KV": lambda q=q, k=wide_k, v=wide_v: F.scaled_dot_product_attention(
                    q, k, v, is_causal=True
                ),
                **peers,
            },
            run.threads,
            run.runs,
        )
        amount = 2.0 * head_dim * kv_heads * group * chunk * (chunk + 1) / 1e9
        work = f"prefill {name} kv {kv_heads} group {group} D {head_dim} chunk {chunk}"
        yield figure(work, run.threads, times, amount, "GFLOP/s", operations / 1e9)


def moves(run: Run) -> Iterator[Figure]:
    outs, lses = torch.randn(8, 2048, 32, 128), torch.randn(8, 2048, 32)
    wanted = (lses.double().softmax(0)[..., None] * outs.double()).sum(0), lses.double().logsumexp(0)
    check(merge(outs, lses), wanted, 1e-5)
    target, room = torch.empty_like(outs), (torch.empty_like(outs[0]), torch.empty_like(lses[0]))
    merge_out(outs, lses, *room)
    check(room, wanted, 1e-5)
    times = in_turn(
        {"ours": lambda: merge_out(outs, lses, *room), "ceiling": lambda: target.copy_(outs)}, run.threads, run.runs
    )
    # A copy moves each byte twice, the merge reads 8 parts and writes one.
    yield figure(
        "merge of 8 partials, results at hand",
        run.threads,
        times,
        outs.nbytes * 9 / 8 / 1e9,
        "GB/s",
        outs.nbytes * 2 / 1e9,
    )

    case = Sequence(Shape(8, 4, 128, torch.bfloat16), 64 * SIZE, 1, cache_bytes() * 4)
    half = torch.randperm(len(case.pool))[: len(case.pool) // 2].contiguous()
    if not torch.equal(gather_rblocks(case.pool, half), case.pool[half]):
        raise SystemExit("wrong answer: gather_rblocks")
    whole = case.pool[: len(half)]
    copies: dict[str, Work] = {"ours": lambda: gather_rblocks(case.pool, half), "ceiling": lambda: whole.clone()}
    times = in_turn(copies, run.threads, run.runs)
    yield figure("gather for migration", run.threads, times, whole.nbytes * 2 / 1e9, "GB/s")

    k, v = torch.randn(2, len(half) * SIZE, 8, 128, dtype=torch.bfloat16).unbind()
    slots = torch.cat([torch.arange(SIZE) + block * SIZE for block in half.tolist()])
    store_kv(k, v, case.pool, LAYER, slots)
    if not torch.equal(case.pool[slots // SIZE, LAYER, :, 0, slots % SIZE], k):
        raise SystemExit("wrong answer: store_kv")
    pair, pair_copy = torch.stack([k, v]), torch.stack([k, v])
    angles = rotary_table(torch.arange(len(k)), RotaryConfig(), k.shape[2])
    store_kv(k, v, case.pool, LAYER, slots, *angles)
    if not torch.equal(case.pool[slots // SIZE, LAYER, :, 0, slots % SIZE], apply_rope(k, *angles)):
        raise SystemExit("wrong answer: store_kv with RoPE")
    copy = partial(pair_copy.copy_, pair)
    stores: dict[str, dict[str, Work]] = {
        "store_kv": {"ours": lambda: store_kv(k, v, case.pool, LAYER, slots), "ceiling": copy},
        "store_kv with RoPE": {
            "ours": lambda: store_kv(k, v, case.pool, LAYER, slots, *angles),
            "ceiling": copy,
            "apply_rope, then store_kv": lambda: store_kv(apply_rope(k, *angles), v, case.pool, LAYER, slots),
        },
    }
    for name, works in stores.items():
        # Angles are not counted: they are read once per token, and lie in the cache in a decode
        times = in_turn(works, run.threads, run.runs)
        yield figure(f"{name} of {len(slots)} tokens", run.threads, times, pair.nbytes * 2 / 1e9, "GB/s")


def dispatch(run: Run) -> Iterator[Figure]:
    """What a decode call costs beside its work: one token, one key, one head."""
    case = Sequence(Shape(1, 1, 64, torch.bfloat16), SIZE, 1)
    case.positions = torch.zeros(1, dtype=torch.int64)
    out, lse = case.attend()
    indices = (case.ids, case.starts, case.cu_blocks, case.cu_queries, case.positions)
    calls = 2000

    def new_results() -> None:
        for _ in range(calls):
            case.attend()

    def results_at_hand() -> None:
        for _ in range(calls):
            micro_attention_out(case.q, case.pool, LAYER, *indices, case.scale, True, None, None, out, lse)

    times = in_turn({"new results": new_results, "results at hand": results_at_hand}, run.threads, run.runs)
    for name, took in times.items():
        value = statistics.median(took) / calls * 1e6
        yield Figure(f"dispatch of a decode call, {name}", device(), run.threads, value, "us", 3.0, 3.0 / value, {})


def figure(
    work: str, threads: int, times: dict[str, list[float]], amount: float, unit: str, ceiling_amount: float = 0.0
) -> Figure:
    """`amount` of work per call, and of the ceiling's per call where it differs."""
    scale = amount / (ceiling_amount or amount)
    ours = times.pop("ours")
    best = times.pop("ceiling")
    peers = {name: round(median_ratio(ours, theirs), 2) for name, theirs in times.items()}
    value, ceiling = amount / statistics.median(ours), amount / scale / statistics.median(best)
    return Figure(work, device(), threads, value, unit, ceiling, median_ratio(ours, best) * scale, peers)


def device() -> str:
    return f"CPU, {backend_in_use()} {instruction_set() or ''}".strip() + f", pools on {pool_pages()}"


WORKS = {"decode": decode, "int8": int8, "prefill": prefill, "moves": moves, "dispatch": dispatch}


def measure(run: Run, only: str | None) -> list[Figure]:
    """Every figure, printed as it comes."""
    figures = []
    for name, work in WORKS.items():
        if only in (None, name):
            for row in work(run):
                figures.append(row)
                peers = "  ".join(f"{ratio:.1f}x {peer}" for peer, ratio in row.peers.items())
                print(f"{row.work:48} {row.value:8.1f} {row.unit:8} of {row.ceiling:7.1f} = {row.share:4.2f}  {peers}")
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--only", choices=WORKS, help="one kind of work")
    parser.add_argument("--isa", help="an instruction set of the C++ kernels other than the best")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--vllm-python", type=Path, help="a Python with vLLM on CPU: its op is a peer in bf16")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.isa and not cpu.use_instruction_set(args.isa):
        parser.error(f"no instruction set {args.isa} here")
    print(f"{describe_machine()}; {device()}")
    with VllmPeer(args.vllm_python, args.threads) if args.vllm_python else nullcontext() as vllm:
        figures = measure(Run(args.threads, args.runs, vllm), args.only)
    if args.json is not None:
        args.json.write_text(json.dumps([row._asdict() for row in figures], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
