"""Real processes in gloo groups for test_context_parallel.py: each computes its shard of a case, with gradients."""

import multiprocessing
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_distkv.context_parallel import ContextShard, ZigzagLayout, ring_attention

SCALE = 0.3
NUM_RANKS = 4


@dataclass(frozen=True)
class Case:
    num_tokens: int
    size: int
    query_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    batch: int = 1
    document_starts: tuple[int, ...] = (0,)
    dtype: torch.dtype = torch.float32
    seed: int = 0

    @property
    def layout(self) -> ZigzagLayout:
        return ZigzagLayout(self.num_tokens, self.size, self.document_starts)

    def tensors(self) -> list[torch.Tensor]:
        """q, k, v and the gradient of out, whole."""
        rng = torch.Generator().manual_seed(self.seed)
        heads = (self.query_heads, self.kv_heads, self.kv_heads, self.query_heads)
        shapes = [(self.num_tokens, self.batch, count, self.head_dim) for count in heads]
        return [torch.randn(shape, generator=rng, dtype=torch.float64).to(self.dtype) for shape in shapes]


class Result(NamedTuple):
    out: torch.Tensor
    d_q: torch.Tensor
    d_k: torch.Tensor
    d_v: torch.Tensor


class Ranks:
    """`NUM_RANKS` processes; a case runs on the first of them."""

    def __init__(self, directory: Path) -> None:
        # Forked by a server that has imported this module once, and has never computed.
        forking = multiprocessing.get_context("forkserver")
        forking.set_forkserver_preload([__name__])
        pipes = [forking.Pipe() for _ in range(NUM_RANKS)]
        self._ends = [mine for mine, _ in pipes]
        self._processes = [
            forking.Process(target=_serve, args=(rank, str(directory / "store"), theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self._processes:
            process.start()

    def run(self, case: Case) -> Result:
        """The shards' results, put together as the whole sequence's."""
        for end in self._ends[: case.size]:
            end.send(case)
        whole = [torch.full_like(tensor, float("nan")) for tensor in (case.tensors()[i] for i in (0, 0, 1, 2))]
        for rank, end in enumerate(self._ends[: case.size]):
            assert end.poll(60), f"rank {rank} is silent"
            answer = end.recv()
            assert not isinstance(answer, str), answer
            for tensor, part in zip(whole, answer, strict=True):
                tensor[case.layout.tokens(rank)] = torch.from_numpy(part).to(tensor.dtype)
        return Result(*whole)

    def close(self) -> None:
        for end in self._ends:
            end.send(None)
        for process in self._processes:
            process.join(10)
            process.kill()


def _serve(rank: int, store: str, end: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=NUM_RANKS, timeout=timedelta(seconds=30)
    )
    groups = {size: dist.new_group(list(range(size))) for size in range(2, NUM_RANKS + 1)}
    while (case := end.recv()) is not None:
        try:
            shard = ContextShard(case.layout, rank, groups.get(case.size))
            end.send([tensor.double().numpy() for tensor in run_shard(case, shard)])
        except Exception as error:
            end.send(f"rank {rank}: {error!r}")


def run_shard(case: Case, shard: ContextShard) -> Result:
    q, k, v, d_out = (tensor[shard.tokens] for tensor in case.tensors())
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    out = ring_attention(*leaves, shard, SCALE)
    out.backward(d_out)
    gradients = [leaf.grad for leaf in leaves]
    assert all(gradient is not None for gradient in gradients)
    return Result(out.detach(), *gradients)
