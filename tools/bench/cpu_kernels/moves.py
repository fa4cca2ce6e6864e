"""What moves memory: merging partials, taking rBlocks out of a pool, storing new tokens. A copy is the ceiling."""

from collections.abc import Iterator
from functools import partial

import torch

from megatron_distkv.attention.rotary import RotaryConfig, rotary_table
from megatron_distkv.ops import apply_rope, gather_rblocks, merge, merge_out, store_kv
from tools.bench.ceilings import Work
from tools.bench.cpu_kernels.figure import Amount, Figure, Run
from tools.bench.rblock_sequence import LAYER, SIZE, Sequence, Shape, cache_bytes
from tools.bench.reference_attention import check

NUM_PARTIALS, NUM_TOKENS, NUM_HEADS, KV_HEADS, HEAD_DIM = 8, 2048, 32, 8, 128


def moves(run: Run) -> Iterator[Figure]:
    yield _merge(run)
    case = Sequence(Shape(KV_HEADS, 4, HEAD_DIM, torch.bfloat16), 64 * SIZE, 1, cache_bytes() * 4)
    half = torch.randperm(len(case.pool))[: len(case.pool) // 2].contiguous()
    yield _gather(run, case.pool, half)
    yield from _store(run, case.pool, half)


def _merge(run: Run) -> Figure:
    outs = torch.randn(NUM_PARTIALS, NUM_TOKENS, NUM_HEADS, HEAD_DIM)
    lses = torch.randn(NUM_PARTIALS, NUM_TOKENS, NUM_HEADS)
    wanted = (lses.double().softmax(0)[..., None] * outs.double()).sum(0), lses.double().logsumexp(0)
    check(merge(outs, lses), wanted, 1e-5)
    target, room = torch.empty_like(outs), (torch.empty_like(outs[0]), torch.empty_like(lses[0]))
    merge_out(outs, lses, *room)
    check(room, wanted, 1e-5)
    works: dict[str, Work] = {
        "ours": lambda: merge_out(outs, lses, *room),
        "ceiling": lambda: target.copy_(outs),
    }
    # A copy moves each byte twice, the merge reads all parts and writes one.
    amount = Amount(outs.nbytes * (1 + 1 / NUM_PARTIALS) / 1e9, "GB/s", outs.nbytes * 2 / 1e9)
    return run.figure(f"merge of {NUM_PARTIALS} partials, results at hand", works, amount)


def _gather(run: Run, pool: torch.Tensor, ids: torch.Tensor) -> Figure:
    if not torch.equal(gather_rblocks(pool, ids), pool[ids]):
        raise SystemExit("wrong answer: gather_rblocks")
    whole = pool[: len(ids)]
    copies: dict[str, Work] = {"ours": lambda: gather_rblocks(pool, ids), "ceiling": lambda: whole.clone()}
    return run.figure("gather for migration", copies, Amount(whole.nbytes * 2 / 1e9, "GB/s"))


def _store(run: Run, pool: torch.Tensor, ids: torch.Tensor) -> Iterator[Figure]:
    k, v = torch.randn(2, len(ids) * SIZE, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16).unbind()
    slots = torch.cat([torch.arange(SIZE) + block * SIZE for block in ids.tolist()])
    angles = rotary_table(torch.arange(len(k)), RotaryConfig(), HEAD_DIM)
    _check_store(pool, slots, k, v)
    _check_store(pool, slots, k, v, *angles)
    pair, pair_copy = torch.stack([k, v]), torch.stack([k, v])
    copy = partial(pair_copy.copy_, pair)
    stores: dict[str, dict[str, Work]] = {
        "store_kv": {"ours": lambda: store_kv(k, v, pool, LAYER, slots), "ceiling": copy},
        "store_kv with RoPE": {
            "ours": lambda: store_kv(k, v, pool, LAYER, slots, *angles),
            "ceiling": copy,
            "apply_rope, then store_kv": lambda: store_kv(apply_rope(k, *angles), v, pool, LAYER, slots),
        },
    }
    for name, works in stores.items():
        # Angles are not counted: they are read once per token, and lie in the cache in a decode
        yield run.figure(f"{name} of {len(slots)} tokens", works, Amount(pair.nbytes * 2 / 1e9, "GB/s"))


def _check_store(
    pool: torch.Tensor, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *angles: torch.Tensor
) -> None:
    store_kv(k, v, pool, LAYER, slots, *angles)
    wanted = apply_rope(k, *angles) if angles else k
    if not torch.equal(pool[slots // SIZE, LAYER, :, 0, slots % SIZE], wanted):
        raise SystemExit(f"wrong answer: store_kv{' with RoPE' * bool(angles)}")
