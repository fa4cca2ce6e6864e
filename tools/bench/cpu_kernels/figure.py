"""How a kernel is measured on CPUs, and what is said of it: its rate, and its share of the same rounds' ceiling."""

import statistics
from typing import NamedTuple

import torch

from megatron_distkv.ops import backend_in_use, instruction_set
from tools.bench.ceilings import Work, in_turn, median_ratio
from tools.bench.rblock_sequence import pool_pages
from tools.bench.reference_attention import check
from tools.bench.vllm_peer import VllmPeer

DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
TOLERANCES = {torch.bfloat16: 4e-3, torch.float32: 1e-5}
# Of many queries every so manieth is checked.
CHECKED = 37
VLLM_TOLERANCE = 1e-2  # its results are bf16


class Figure(NamedTuple):
    work: str
    device: str
    threads: int
    value: float
    unit: str
    ceiling: float
    share: float
    peers: dict[str, float]


class Amount(NamedTuple):
    """What a call does; `of_ceiling`: what a call of the ceiling does, where that differs."""

    each: float
    unit: str
    of_ceiling: float = 0.0


class Run(NamedTuple):
    """How it is measured: `vllm` is a peer where its Python was given."""

    threads: int
    runs: int
    vllm: VllmPeer | None = None

    def times(self, works: dict[str, Work]) -> dict[str, list[float]]:
        return in_turn(works, self.threads, self.runs)

    def figure(self, work: str, works: dict[str, Work], amount: Amount) -> Figure:
        """Of `works["ours"]`, by `works["ceiling"]`; the others are peers."""
        times = self.times(works)
        ours, best = times.pop("ours"), times.pop("ceiling")
        scale = amount.each / (amount.of_ceiling or amount.each)
        peers = {name: round(median_ratio(ours, theirs), 2) for name, theirs in times.items()}
        value, ceiling = amount.each / statistics.median(ours), amount.each / scale / statistics.median(best)
        share = median_ratio(ours, best) * scale
        return Figure(work, device(), self.threads, value, amount.unit, ceiling, share, peers)

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


def device() -> str:
    return f"CPU, {backend_in_use()} {instruction_set() or ''}".strip() + f", pools on {pool_pages()}"
