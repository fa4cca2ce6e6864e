"""DistAttention's kernels on a GPU against its measured copy bandwidth and matrix rate, and against peers on dense KV.

Every answer is checked against float64 first. rBlocks lie in random order in the pool; peers get K and V in one piece.
"""

import statistics
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from megatron_distkv.ops import gather_rblocks, merge, micro_attention, store_kv, tile_backward, use_backend
from tools.bench.gpu_timing import Stopwatch, Work, median_ratio

SIZE, SEED, GROUP, HEAD_DIM = 64, 0, 4, 128
TOLERANCE, LSE_TOLERANCE, GRADIENT_TOLERANCE = 4e-3, 1e-4, 1e-2


class Figure(NamedTuple):
    work: str
    device: str
    value: float
    unit: str
    ceiling: float
    share: float
    spread: float
    peers: dict[str, float]


class Sizes(NamedTuple):
    kv_heads: int
    decodes: list[tuple[int, int]]  # context, batch
    prefills: list[int]
    copied_bytes: int
    matrix: int
    runs: int


ON_A_GPU = Sizes(8, [(32768, 1), (32768, 16), (32768, 64), (131072, 1), (131072, 16)], [2048, 8192], 2 << 30, 8192, 15)
DRY = Sizes(1, [(128, 1)], [64], 1 << 16, 64, 1)


class Batch:
    """`batch` sequences of `context` tokens, the last `num_queries` of each as queries."""

    def __init__(self, kv_heads: int, context: int, batch: int, num_queries: int, device: str) -> None:
        torch.manual_seed(SEED)
        self.kv_heads, self.count, self.context, self.batch = kv_heads, context // SIZE, context, batch
        options = {"dtype": torch.bfloat16, "device": device}
        self.pool = torch.randn(batch * self.count + 1, 1, kv_heads, 2, SIZE, HEAD_DIM, **options)
        self.q = torch.randn(batch * num_queries, kv_heads * GROUP, HEAD_DIM, **options)
        self.ids = torch.randperm(len(self.pool), device=device)[: batch * self.count].contiguous()
        self.starts = (torch.arange(self.count, device=device) * SIZE).repeat(batch)
        self.cu_blocks = torch.arange(batch + 1, device=device) * self.count
        self.cu_queries = torch.arange(batch + 1, device=device) * num_queries
        self.positions = torch.arange(context - num_queries, context, device=device).repeat(batch)

    def attend(self) -> tuple[torch.Tensor, torch.Tensor]:
        indices = (self.ids, self.starts, self.cu_blocks, self.cu_queries, self.positions)
        return micro_attention(self.q, self.pool, 0, *indices, HEAD_DIM**-0.5, True)

    def dense_kv(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`[batch, K, X, D]` each."""
        kv = self.pool[self.ids, 0].unflatten(0, (self.batch, self.count))
        k, v = (kv[:, :, :, part].transpose(1, 2).flatten(2, 3).contiguous() for part in (0, 1))
        return k, v

    def check(self, found: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Some rows of the first and last sequence in float64."""
        per_sequence = len(self.q) // self.batch
        for s in {0, self.batch - 1}:
            kv = self.pool[self.ids[s * self.count : (s + 1) * self.count], 0]
            k, v = (kv[:, :, part].transpose(0, 1).flatten(1, 2) for part in (0, 1))
            rows = s * per_sequence + torch.arange(0, per_sequence, 97, device=k.device)
            for head in range(self.kv_heads):
                heads = slice(head * GROUP, (head + 1) * GROUP)
                scores = self.q[rows, heads].double() @ k[head].double().T * HEAD_DIM**-0.5
                is_future = torch.arange(self.context, device=k.device) > self.positions[rows, None, None]
                scores.masked_fill_(is_future, float("-inf"))
                wanted = scores.softmax(-1) @ v[head].double()
                same(found[0][rows, heads], wanted, TOLERANCE)
                error = float((found[1][rows, heads].double() - scores.logsumexp(-1)).abs().max())
                if not error < LSE_TOLERANCE:
                    raise SystemExit(f"wrong answer: LSE is off by {error:.1e}")


def same(found: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    error = float(((found.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max())
    if not error < tolerance:
        raise SystemExit(f"wrong answer: relative error {error:.1e}")


class GpuBench:
    def __init__(self, device: str, sizes: Sizes, libraries: Sequence[str] = ()) -> None:
        """`libraries`: backends that are measured beside ours, over the same scattered rBlocks."""
        self.libraries = libraries
        self.device, self.sizes, self.kv_heads, self.watch = device, sizes, sizes.kv_heads, Stopwatch(device)
        self.name = torch.cuda.get_device_name() if device == "cuda" else "CPU, interpreted: no figure means anything"
        source = torch.empty(sizes.copied_bytes, dtype=torch.int8, device=device)
        target, a = torch.empty_like(source), torch.randn(2, sizes.matrix, sizes.matrix, device=device).bfloat16()
        self.ceilings: dict[str, tuple[Work, float]] = {
            "copy": (lambda: target.copy_(source), 2 * sizes.copied_bytes / 1e9),
            "product": (lambda: a[0] @ a[1], 2 * sizes.matrix**3 / 1e12),
        }

    def figures(self) -> Iterator[Figure]:
        for context, batch in self.sizes.decodes:
            yield self.decode(context, batch)
        for chunk in self.sizes.prefills:
            yield self.prefill(chunk)
        for chunk in self.sizes.prefills:
            yield self.backward(chunk)
        yield from self.moves()

    def decode(self, context: int, batch: int) -> Figure:
        case = Batch(self.kv_heads, context, batch, 1, self.device)
        case.check(case.attend())
        k, v = case.dense_kv()
        q = case.q.view(batch, self.kv_heads * GROUP, 1, HEAD_DIM)
        peers: dict[str, Work] = {
            "torch sdpa, dense KV": lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
            **library_decode(case, k, v),
            **{f"backend {name}, same rBlocks": self._with(name, case) for name in self.libraries},
        }
        return self._figure(f"decode, context {context}, batch {batch}", case.attend, peers, "copy", k.nbytes * 2e-9)

    def _with(self, backend: str, case: Batch) -> Work:
        """Decode by this backend, which is right; all rBlocks are full, so the library has all of it."""

        def attend() -> tuple[torch.Tensor, torch.Tensor]:
            use_backend(backend)
            try:
                return case.attend()
            finally:
                use_backend("triton")

        case.check(attend())
        return attend

    def prefill(self, chunk: int) -> Figure:
        case = Batch(self.kv_heads, chunk, 1, chunk, self.device)
        case.check(case.attend())
        k, v = case.dense_kv()
        q = case.q.transpose(0, 1)[None].contiguous()
        peers: dict[str, Work] = {
            "torch sdpa, dense KV": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        }
        amount = 2.0 * HEAD_DIM * self.kv_heads * GROUP * chunk * (chunk + 1) / 1e12
        return self._figure(f"prefill, chunk {chunk}", case.attend, peers, "product", amount)

    def backward(self, chunk: int) -> Figure:
        torch.manual_seed(SEED)
        shape = (chunk, 1, self.kv_heads * GROUP, HEAD_DIM)
        q, d_out = (torch.randn(shape, device=self.device).bfloat16() for _ in range(2))
        k, v = (torch.randn(chunk, 1, self.kv_heads, HEAD_DIM, device=self.device).bfloat16() for _ in range(2))
        leaves = [x.float().permute(1, 2, 0, 3).requires_grad_() for x in (q, k, v)]
        out = F.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)
        wanted = torch.autograd.grad(out, leaves, d_out.float().permute(1, 2, 0, 3))
        lse = tile_lse(leaves[0].detach(), leaves[1].detach()).permute(2, 0, 1)
        given = (d_out, q, k, v, out.detach().permute(2, 0, 1, 3), lse, HEAD_DIM**-0.5, True)
        for found, gradient in zip(tile_backward(*given), wanted, strict=True):
            same(found.flatten(), gradient.permute(2, 0, 1, 3).flatten().double(), GRADIENT_TOLERANCE)
        small = [x.detach().bfloat16().requires_grad_() for x in leaves]
        peer_out = F.scaled_dot_product_attention(*small, is_causal=True, enable_gqa=True)
        d_peer = d_out.permute(1, 2, 0, 3)
        peers: dict[str, Work] = {
            "torch sdpa": lambda: torch.autograd.grad(peer_out, small, d_peer, retain_graph=True),
        }
        amount = 2.5 * 2.0 * HEAD_DIM * self.kv_heads * GROUP * chunk * (chunk + 1) / 1e12
        return self._figure(f"backward, chunk {chunk}", lambda: tile_backward(*given), peers, "product", amount)

    def moves(self) -> Iterator[Figure]:
        tokens = 8192 if self.device == "cuda" else 16
        rows = (8, tokens, self.kv_heads * GROUP)
        outs, lses = torch.randn(*rows, HEAD_DIM, device=self.device), torch.randn(*rows, device=self.device)
        same(merge(outs, lses)[0], (lses.double().softmax(0)[..., None] * outs.double()).sum(0), 1e-5)
        yield self._figure("merge of 8 partials", lambda: merge(outs, lses), {}, "copy", outs.nbytes * 9 / 8 / 1e9)

        case = Batch(self.kv_heads, tokens * 8, 1, 1, self.device)
        half = case.ids[: case.count // 2]
        if not torch.equal(gather_rblocks(case.pool, half), case.pool[half]):
            raise SystemExit("wrong answer: gather_rblocks")
        moved = len(half) * case.pool[0].nbytes * 2 / 1e9
        yield self._figure("gather for migration", lambda: gather_rblocks(case.pool, half), {}, "copy", moved)

        k, v = torch.randn(2, len(half) * SIZE, self.kv_heads, HEAD_DIM, device=self.device).bfloat16().unbind()
        slots = (half[:, None] * SIZE + torch.arange(SIZE, device=self.device)).flatten()
        store_kv(k, v, case.pool, 0, slots)
        if not torch.equal(case.pool[slots // SIZE, 0, :, 0, slots % SIZE], k):
            raise SystemExit("wrong answer: store_kv")
        yield self._figure(
            f"store_kv of {len(slots)} tokens", lambda: store_kv(k, v, case.pool, 0, slots), {}, "copy", moved
        )

    def _figure(self, name: str, ours: Work, peers: dict[str, Work], limit: str, amount: float) -> Figure:
        """`amount` in GB moved (each read and each write) or in TFLOP, per call."""
        best, best_amount = self.ceilings[limit]
        times = self.watch.in_turn({"ours": ours, "ceiling": best, **peers}, self.sizes.runs)
        value, ceiling = (
            amount / statistics.median(times["ours"]),
            best_amount / statistics.median(times["ceiling"]),
        )
        spread = (max(times["ours"]) - min(times["ours"])) / statistics.median(times["ours"])
        ratios = {peer: round(median_ratio(times["ours"], times[peer]), 2) for peer in peers}
        unit = "GB/s" if limit == "copy" else "TFLOP/s"
        return Figure(name, self.name, value, unit, ceiling, value / ceiling, spread, ratios)


def tile_lse(q_BHSD: torch.Tensor, k_BKSD: torch.Tensor) -> torch.Tensor:
    """A head at a time, for memory."""
    is_future = torch.ones(q_BHSD.shape[2], q_BHSD.shape[2], dtype=torch.bool, device=q_BHSD.device).triu(1)
    lses = []
    for head in range(q_BHSD.shape[1]):
        scores = q_BHSD[:, head] @ k_BKSD[:, head // GROUP].mT * HEAD_DIM**-0.5
        lses.append(scores.masked_fill(is_future, float("-inf")).logsumexp(-1))
    return torch.stack(lses, 1)


def library_decode(case: Batch, k: torch.Tensor, v: torch.Tensor) -> dict[str, Work]:
    """Decode of the libraries that are installed, on dense KV."""
    found: dict[str, Work] = {}
    q, wide_k, wide_v = case.q[:, None], k.transpose(1, 2), v.transpose(1, 2)
    try:
        from flash_attn import flash_attn_with_kvcache
    except ImportError:
        pass
    else:
        found["flash-attn, dense KV"] = lambda: flash_attn_with_kvcache(q, wide_k, wide_v, causal=True)
    try:
        import flashinfer
    except ImportError:
        return found
    if case.batch == 1:
        found["FlashInfer, dense KV"] = lambda: flashinfer.single_decode_with_kv_cache(case.q[0], wide_k[0], wide_v[0])
    return found
