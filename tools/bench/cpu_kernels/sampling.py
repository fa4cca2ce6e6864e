"""Drawing the tokens of a step: 32 requests, a vocabulary of 128k."""

import statistics
from collections.abc import Iterator
from functools import partial

import torch
from megatron_distkv.kernels import reference

from megatron_distkv.ops import sample_tokens
from tools.bench.cpu_kernels.figure import Figure, Run, device

ROWS, VOCABULARY = 32, 128256
# What we allow a step, of any kind: milliseconds on one core.
CEILING_MS = 15.0
# Temperature, top-k, top-p, min-p.
KINDS = {
    "greedy": (0.0, 0, 1.0, 0.0), "temperature": (1.0, 0, 1.0, 0.0), "top-k 50": (1.0, 50, 1.0, 0.0),
    "top-p 0.9": (1.0, 0, 0.9, 0.0), "top-k 50, top-p 0.9": (1.0, 50, 0.9, 0.0), "min-p 0.05": (1.0, 0, 1.0, 0.05),
}  # fmt: skip


def sampling(run: Run) -> Iterator[Figure]:
    """Checked against torch's answer: at most one row may differ, where a rounding decides."""
    generator = torch.Generator().manual_seed(0)
    logits_RV = torch.randn(ROWS, VOCABULARY, generator=generator) * 3
    uniform_R = torch.rand(ROWS, generator=generator, dtype=torch.float64)
    for name, (temperature, top_k, top_p, min_p) in KINDS.items():
        settings = (torch.full((ROWS,), temperature), torch.full((ROWS,), top_k), torch.full((ROWS,), top_p))
        arguments = (logits_RV, *settings, torch.full((ROWS,), min_p), uniform_R)
        if int((sample_tokens(*arguments) != reference.sample(*arguments)).sum()) > 1:
            raise SystemExit(f"sampling by {name} gives other tokens than torch")
        times = run.times({"ours": partial(sample_tokens, *arguments), "torch": partial(reference.sample, *arguments)})
        value = statistics.median(times["ours"]) * 1e3
        peers = {"torch": round(statistics.median(times["torch"]) * 1e3 / value, 2)}
        yield Figure(
            f"sampling, 32 x 128k, {name}", device(), run.threads, value, "ms", CEILING_MS, CEILING_MS / value, peers
        )
