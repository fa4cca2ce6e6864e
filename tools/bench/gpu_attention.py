"""DistAttention's kernels on a GPU against its measured read and copy bandwidth and matrix rate, and against peers on
dense KV. Every answer is checked against float64 first. rBlocks lie in random order in the pool.

`tools/gpu_check.py` runs this in a process of its own and reads a line of JSON when a work begins, and one when it has
its figure or has failed; the process ends where a failure has broken the GPU for all that would follow.
"""

import argparse
import gc
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch

from tools import kernels_only

kernels_only.make_importable()

from megatron_distkv.ops import gather_rblocks, merge, store_kv, tile_backward, use_backend  # noqa: E402
from tools.bench.gpu_batch import (  # noqa: E402
    GRADIENT_TOLERANCE,
    GROUP,
    HEAD_DIM,
    SEED,
    SIZE,
    Batch,
    Int8Batch,
    WrongAnswerError,
    same,
)  # fmt: skip
from tools.bench.gpu_peers import backward_peers, decode_peers, prefill_peers, usable  # noqa: E402
from tools.bench.gpu_timing import Stopwatch, Work, median_ratio  # noqa: E402

BROKEN_GPU = 3  # the exit status that says so


class Figure(NamedTuple):
    work: str
    device: str
    value: float
    unit: str
    ceiling: float
    share: float
    spread: float
    milliseconds: float
    peers: dict[str, float]
    left_out: dict[str, str]  # peers that failed or were wrong, and why


class Sizes(NamedTuple):
    kv_heads: int
    decodes: list[tuple[int, int]]  # context, batch
    int8_decodes: list[tuple[int, int]]
    graphs: list[tuple[int, int]]
    prefills: list[int]
    moved_tokens: int
    copied_bytes: int
    matrix: int
    runs: int


ON_A_GPU = Sizes(
    kv_heads=8,
    decodes=[(32768, 1), (32768, 16), (32768, 64), (131072, 1), (131072, 16)],
    int8_decodes=[(32768, 1), (32768, 16)],
    graphs=[(32768, 1)],
    prefills=[2048, 8192],
    moved_tokens=8192,
    copied_bytes=2 << 30,
    matrix=8192,
    runs=15,
)
DRY = Sizes(1, [(128, 1)], [(128, 1)], [(128, 1)], [64], 16, 1 << 16, 64, 1)


def works_of(sizes: Sizes) -> list[tuple[str, Callable[["GpuBench"], Figure]]]:
    """What matters most comes first, as time may run out."""
    shapes = [f"context {context}, batch {batch}" for context, batch in sizes.decodes]
    works: list[tuple[str, Callable[[GpuBench], Figure]]] = [
        (f"decode, {shape}", partial(GpuBench.decode, context=context, batch=batch))
        for shape, (context, batch) in zip(shapes, sizes.decodes, strict=True)
    ]
    works += [(f"prefill, chunk {chunk}", partial(GpuBench.prefill, chunk=chunk)) for chunk in sizes.prefills]
    for kind, method, cases in (
        ("int8 decode", GpuBench.int8_decode, sizes.int8_decodes),
        ("decode from a CUDA graph", GpuBench.graph, sizes.graphs),
    ):
        works += [(f"{kind}, context {c}, batch {b}", partial(method, context=c, batch=b)) for c, b in cases]
    works += [(f"backward, chunk {chunk}", partial(GpuBench.backward, chunk=chunk)) for chunk in sizes.prefills]
    works += [("merge of 8 partials", GpuBench.merging), ("gather for migration", GpuBench.gathering)]
    return [*works, ("store_kv", GpuBench.storing)]


class GpuBench:
    def __init__(self, device: str, sizes: Sizes, libraries: Sequence[str] = (), has_peers: bool = True) -> None:
        """`libraries`: backends that are measured beside ours, over the same scattered rBlocks."""
        self.libraries, self.has_peers = libraries, has_peers
        self.device, self.sizes, self.kv_heads, self.watch = device, sizes, sizes.kv_heads, Stopwatch(device)
        self.name = torch.cuda.get_device_name() if device == "cuda" else "CPU, interpreted: no figure means anything"
        source = torch.empty(sizes.copied_bytes, dtype=torch.int8, device=device)
        target, a = torch.empty_like(source), torch.randn(2, sizes.matrix, sizes.matrix, device=device).bfloat16()
        copy: tuple[Work, float] = (lambda: target.copy_(source), 2 * sizes.copied_bytes / 1e9)
        read: tuple[Work, float] = (lambda: source.view(torch.int32).amax(), sizes.copied_bytes / 1e9)
        self.ceilings: dict[str, list[tuple[Work, float]]] = {
            "copy": [copy],
            "read": [copy, read],  # the faster one
            "product": [(lambda: a[0] @ a[1], 2 * sizes.matrix**3 / 1e12)],
        }

    def decode(self, context: int, batch: int) -> Figure:
        case = Batch(self.kv_heads, context, batch, 1, self.device)
        case.check(case.attend())
        k, v = case.dense_kv()
        peers = decode_peers(case, k, v, self.libraries)
        return self._figure(f"decode, context {context}, batch {batch}", case.attend, peers, "read", 2e-9 * k.nbytes)

    def int8_decode(self, context: int, batch: int) -> Figure:
        wide = Batch(self.kv_heads, context, batch, 1, self.device)
        case = Int8Batch(wide)
        case.check()
        amount = sum(x.nbytes for x in case.rblocks) * len(wide.ids) / len(wide.pool) / 1e9
        name = f"int8 decode, context {context}, batch {batch}"
        return self._figure(name, case.attend, {"the same in bf16": wide.attend}, "read", amount)

    def graph(self, context: int, batch: int) -> Figure:
        """Recorded once, replayed over other rBlocks: nothing in it may have waited for the host."""
        case = Batch(self.kv_heads, context, batch, 1, self.device)
        out = torch.empty(case.q.shape, dtype=torch.float32, device=self.device)
        results = out, torch.empty(case.q.shape[:2], dtype=torch.float32, device=self.device)
        replay = self._recorded(lambda: case.attend_into(*results))
        case.ids.copy_(case.ids.flip(0))
        for result in results:
            result.fill_(float("nan"))
        replay()
        case.check(results)
        amount = case.pool[0].nbytes * len(case.ids) / 1e9
        name = f"decode from a CUDA graph, context {context}, batch {batch}"
        return self._figure(name, replay, {"a call from Python": case.attend}, "read", amount)

    def _recorded(self, work: Work) -> Work:
        work()  # compiled
        if self.device != "cuda":
            return work
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph.replay

    def prefill(self, chunk: int) -> Figure:
        case = Batch(self.kv_heads, chunk, 1, chunk, self.device)
        case.check(case.attend())
        amount = 2.0 * HEAD_DIM * self.kv_heads * GROUP * chunk * (chunk + 1) / 1e12
        return self._figure(f"prefill, chunk {chunk}", case.attend, prefill_peers(case), "product", amount)

    def backward(self, chunk: int) -> Figure:
        torch.manual_seed(SEED)
        shape = (chunk, 1, self.kv_heads * GROUP, HEAD_DIM)
        q, d_out = (torch.randn(shape, device=self.device).bfloat16() for _ in range(2))
        k, v = (torch.randn(chunk, 1, self.kv_heads, HEAD_DIM, device=self.device).bfloat16() for _ in range(2))
        out, lse, *wanted = exact_gradients(q, k, v, d_out)
        given = (d_out, q, k, v, out, lse, HEAD_DIM**-0.5, True)
        for found, gradient in zip(tile_backward(*given), wanted, strict=True):
            same(found.flatten(), gradient.flatten(), GRADIENT_TOLERANCE)
        amount = 2.5 * 2.0 * HEAD_DIM * self.kv_heads * GROUP * chunk * (chunk + 1) / 1e12
        peers = backward_peers(q, k, v, d_out)
        return self._figure(f"backward, chunk {chunk}", lambda: tile_backward(*given), peers, "product", amount)

    def merging(self) -> Figure:
        rows = (8, self.sizes.moved_tokens, self.kv_heads * GROUP)
        outs, lses = torch.randn(*rows, HEAD_DIM, device=self.device), torch.randn(*rows, device=self.device)
        same(merge(outs, lses)[0], (lses.double().softmax(0)[..., None] * outs.double()).sum(0), 1e-5)
        return self._figure("merge of 8 partials", lambda: merge(outs, lses), {}, "copy", outs.nbytes * 9 / 8 / 1e9)

    def gathering(self) -> Figure:
        case, half = self._half_a_pool()
        if not torch.equal(gather_rblocks(case.pool, half), case.pool[half]):
            raise WrongAnswerError("gather_rblocks")
        moved = len(half) * case.pool[0].nbytes * 2 / 1e9
        return self._figure("gather for migration", lambda: gather_rblocks(case.pool, half), {}, "copy", moved)

    def storing(self) -> Figure:
        case, half = self._half_a_pool()
        k, v = torch.randn(2, len(half) * SIZE, self.kv_heads, HEAD_DIM, device=self.device).bfloat16().unbind()
        slots = (half[:, None] * SIZE + torch.arange(SIZE, device=self.device)).flatten()
        store_kv(k, v, case.pool, 0, slots)
        if not torch.equal(case.pool[slots // SIZE, 0, :, 0, slots % SIZE], k):
            raise WrongAnswerError("store_kv")
        moved = len(half) * case.pool[0].nbytes * 2 / 1e9
        return self._figure("store_kv", lambda: store_kv(k, v, case.pool, 0, slots), {}, "copy", moved)

    def _half_a_pool(self) -> tuple[Batch, torch.Tensor]:
        case = Batch(self.kv_heads, self.sizes.moved_tokens * 8, 1, 1, self.device)
        return case, case.ids[: case.count // 2]

    def _figure(self, name: str, ours: Work, peers: dict[str, Work], limit: str, amount: float) -> Figure:
        """`amount` in GB moved (each read and each write) or in TFLOP, per call."""
        peers, left_out = usable(peers) if self.has_peers else ({}, {"all peers": "one of them ended the process"})
        best = {f"ceiling {i}": work for i, (work, _) in enumerate(self.ceilings[limit])}
        times = self.watch.in_turn({"ours": ours, **best, **peers}, self.sizes.runs)
        medians = {work: statistics.median(seconds) for work, seconds in times.items()}
        value = amount / medians["ours"]
        ceiling = max(most / medians[f"ceiling {i}"] for i, (_, most) in enumerate(self.ceilings[limit]))
        spread = (max(times["ours"]) - min(times["ours"])) / medians["ours"]
        ratios = {peer: round(median_ratio(times["ours"], times[peer]), 2) for peer in peers}
        unit = "TFLOP/s" if limit == "product" else "GB/s"
        share, milliseconds = value / ceiling, 1e3 * medians["ours"]
        return Figure(name, self.name, value, unit, ceiling, share, spread, milliseconds, ratios, left_out)


def exact_gradients(
    q_SBHD: torch.Tensor, k_SBKD: torch.Tensor, v_SBKD: torch.Tensor, d_out_SBHD: torch.Tensor
) -> list[torch.Tensor]:
    """out and LSE, and the gradients of q, k and v, of causal attention in fp32: a KV head at a time, for memory."""
    parts = []
    for head in range(k_SBKD.shape[2]):
        heads = slice(head * GROUP, (head + 1) * GROUP)
        q, k, v = (x.float().requires_grad_() for x in (q_SBHD[:, :, heads], k_SBKD[:, :, head], v_SBKD[:, :, head]))
        scores = torch.einsum("sbgd,xbd->sbgx", q, k) * HEAD_DIM**-0.5
        is_future = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(is_future[:, None, None], float("-inf"))
        out = torch.einsum("sbgx,xbd->sbgd", scores.softmax(-1), v)
        gradients = torch.autograd.grad(out, (q, k, v), d_out_SBHD[:, :, heads].float())
        d_q, d_k, d_v = gradients
        parts.append((out.detach(), scores.detach().logsumexp(-1), d_q, d_k[:, :, None], d_v[:, :, None]))
    return [torch.cat(tensors, 2) for tensors in zip(*parts, strict=True)]


def tell(**what: object) -> None:
    print(json.dumps(what), flush=True)


def is_alive(device: str) -> bool:
    try:
        if device == "cuda":
            torch.cuda.synchronize()
            torch.ones(1, device=device).item()
    except RuntimeError:
        return False
    return True


def reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--works", nargs="*", help="their names; all")
    parser.add_argument("--libraries", nargs="*", default=[])
    parser.add_argument("--without-peers", action="store_true")
    args = parser.parse_args()
    device, sizes = ("cpu", DRY) if args.dry_run else ("cuda", ON_A_GPU)
    use_backend("triton")
    bench = GpuBench(device, sizes, args.libraries, not args.without_peers)
    for name, work in works_of(sizes):
        if args.works is not None and name not in args.works:
            continue
        tell(begun=name)
        try:
            tell(figure=work(bench)._asdict())
        except Exception as error:  # whatever it is, the next one may work
            is_gpu_broken = not is_alive(device)
            tell(failed=reason(error), is_gpu_broken=is_gpu_broken)
            if is_gpu_broken:
                return BROKEN_GPU
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
