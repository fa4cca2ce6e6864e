"""vLLM's CPU attention over its own paged cache, for whoever holds the other end of stdin and stdout.

Runs in vLLM's Python and imports nothing of ours. A line `FILE THREADS BLOCK_SIZE` makes a case of the q, k and v in
FILE (torch.save: q [T, H, D], k and v [X, K, D], whose last T tokens are the queries), computes it once and puts the
result, [T, H, D], in FILE.out; each line `run` computes it again. Either is answered by a line: the seconds it took.
"""

import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

SEED = 0


def load_kernels() -> None:
    """The library that vLLM would choose, without the rest of vLLM."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        raise SystemExit(f"no vLLM for {sys.executable}")
    has_avx512, has_bf16 = torch.cpu._is_avx512_supported(), torch.cpu._is_avx512_bf16_supported()
    name = "_C" if has_avx512 and has_bf16 else "_C_AVX512" if has_avx512 else "_C_AVX2"
    torch.ops.load_library(Path(spec.origin).with_name(f"{name}.abi3.so"))


def make_case(file: str, num_threads: int, block_size: int) -> Callable[[], torch.Tensor]:
    """Blocks lie in random order in a cache of twice as many: `[blocks, K, 2 * block_size, D]`, K's rows, then V's."""
    torch.set_num_threads(num_threads)
    torch.manual_seed(SEED)
    q, k, v = torch.load(file)
    num_tokens, num_heads, head_dim = q.shape
    num_keys, kv_heads, _ = k.shape
    count = -(-num_keys // block_size)
    cache = torch.zeros(2 * count, kv_heads, 2 * block_size, head_dim, dtype=k.dtype)
    k_cache, v_cache = cache.chunk(2, dim=2)
    blocks = torch.randperm(2 * count)[:count]
    slots = (blocks[:, None] * block_size + torch.arange(block_size)).flatten()[:num_keys]
    isa = "amx" if torch.cpu._is_amx_tile_supported() and k.dtype == torch.bfloat16 else "vec"
    ops = torch.ops._C
    ops.cpu_attn_reshape_and_cache(k, v, k_cache, v_cache, slots, isa, 1.0, 1.0, "auto")
    starts = torch.tensor([0, num_tokens], dtype=torch.int32)
    lengths = torch.tensor([num_keys], dtype=torch.int32)
    plan = ops.get_scheduler_metadata(
        1, num_heads, kv_heads, head_dim, lengths, q.dtype, starts, True, -1, isa, True, None, "auto"
    )
    table, out = blocks.to(torch.int32)[None], torch.empty_like(q)

    def attend() -> torch.Tensor:
        ops.cpu_attention_with_kv_cache(
            q, k_cache, v_cache, out, starts, lengths, head_dim**-0.5, True, None, -1, table, 0.0, plan, None, None,
            1.0, 1.0, "auto",
        )  # fmt: skip
        return out

    return attend


def seconds(work: Callable[[], torch.Tensor]) -> float:
    """As tools/bench/ceilings.py measures it."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    work()
    return clock() - start


def main() -> int:
    load_kernels()
    attend: Callable[[], torch.Tensor] | None = None
    for line in sys.stdin:
        if line.strip() == "run":
            assert attend is not None
            print(seconds(attend), flush=True)
            continue
        file, num_threads, block_size = line.split()
        attend = make_case(file, int(num_threads), int(block_size))
        torch.save(attend().clone(), f"{file}.out")
        print(seconds(attend), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
