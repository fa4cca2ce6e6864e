"""Launch shapes of attention, from shapes alone: tile sizes, warps, stages, and into how many splits the keys are cut.

Chosen for an H100, whose SM has 64k registers (a thread at most 255) and 228 KiB of shared memory (a program at most
227, and 1 KiB of each is the driver's). `tools/compile_triton.py` compiles every shape that is named here and says
which spills or leaves fewer programs on an SM than `per_sm`; docs/experiments.md has the figures.
"""

from functools import lru_cache
from typing import NamedTuple

# A tensor core takes no fewer rows; 128 rows share what they read of L2, whose speed half of them would exceed.
FEWEST_ROWS, MOST_ROWS = 16, 128
FEWEST_RBLOCKS_PER_SPLIT, MOST_SPLITS = 4, 128
IDLE_TOLERATED = 0.1


class LaunchShape(NamedTuple):
    rows: int
    keys: int  # of one step
    num_warps: int
    num_stages: int
    per_sm: int  # programs that an SM has room for at a time


def attention_shape(
    num_rows: int,
    num_sequences: int,
    head_dim: int,
    rblock_size: int,
    is_exact: bool = False,
    is_windowed: bool = False,
    is_int8: bool = False,
) -> LaunchShape:
    """`num_rows`: query tokens times query heads per KV head, of all sequences; `head_dim` padded.

    A tile holds the rows of one sequence and one KV head, so it is as large as a sequence has rows on average: a
    token's group in decode, 128 in prefill.
    """
    rows = min(MOST_ROWS, max(FEWEST_ROWS, power_of_2(-(-num_rows // max(1, num_sequences)))))
    if is_exact:
        # fp32 goes past the tensor cores: a thread holds all its products' operands, and with fewer threads they spill.
        rows, keys = (FEWEST_ROWS, 32) if rows == FEWEST_ROWS else (64, 16)
        return LaunchShape(rows, keys_per_step(rblock_size, keys), num_warps=8, num_stages=2, per_sm=1)
    # A thread keeps rows x head_dim / threads sums of the output and rows x keys / threads scores: 64 + 32 at 128 rows,
    # head dim 128 and 8 warps, which with addresses and the weights in bf16 fills 255 registers. Wider heads and the
    # second mask of a window leave room for half the keys.
    is_tight = head_dim > 128 or (is_windowed and rows == MOST_ROWS)
    keys = keys_per_step(rblock_size, 32 if is_tight and rows > 32 else 64)
    # 3 stages: two copies of K and V in flight while a third is used, 96 KiB at head dim 128 and 64 keys. In decode two
    # such programs already have more bytes in flight (128 KiB) than memory's delay times its speed asks of an SM (25).
    return LaunchShape(
        rows, keys, 8 if rows == MOST_ROWS else 4, num_stages=3, per_sm=_per_sm(rows, head_dim, is_int8, is_windowed)
    )


def _per_sm(rows: int, head_dim: int, is_int8: bool, is_windowed: bool) -> int:
    """Decode wants many programs, so that while one forms its softmax others read; registers set the limit."""
    if rows == MOST_ROWS or head_dim > 128:
        return 1
    if rows > FEWEST_ROWS or is_int8 or is_windowed:
        return 2
    return 3


def backward_shapes(head_dim: int, is_exact: bool = False) -> tuple[LaunchShape, LaunchShape]:
    """Of the gradients of K and V, and of Q; `head_dim` padded.

    The first keeps two sums of keys x head_dim beside four products of a step: with more than 32 rows at a time its
    threads spill. The second keeps one, so that 128 rows share what is read of K and V.
    """
    if is_exact or head_dim > 128:
        shape = LaunchShape(rows=32, keys=32, num_warps=8, num_stages=2, per_sm=1)
        return shape, shape
    return (
        LaunchShape(rows=32, keys=64, num_warps=8, num_stages=3, per_sm=1),
        LaunchShape(rows=128, keys=64, num_warps=8, num_stages=3, per_sm=1),
    )


def keys_per_step(rblock_size: int, largest: int) -> int:
    """A divisor of the rBlock where there is one that fits, so that a step reads from one rBlock only."""
    if rblock_size >= 16 and rblock_size % 16 == 0:
        return next(keys for keys in (largest, 32, 16) if rblock_size % keys == 0)
    return min(largest, 32)


@lru_cache(1024)
def num_splits(num_programs: int, rblocks_per_sequence: int, num_places: int) -> int:
    """Of `num_programs` without splits on a GPU with room for `num_places`: the fewest splits that leave it hardly
    more idle than the best choice would, the last round of programs counted. A split has at least 4 rBlocks."""
    most = max(1, min(rblocks_per_sequence // FEWEST_RBLOCKS_PER_SPLIT, MOST_SPLITS))
    busy = [_share_busy(num_programs, splits, rblocks_per_sequence, num_places) for splits in range(1, most + 1)]
    return next(splits for splits, share in enumerate(busy, 1) if share >= (1 - IDLE_TOLERATED) * max(busy))


def _share_busy(num_programs: int, splits: int, rblocks: int, num_places: int) -> float:
    rblocks_of_a_split = max(1, -(-rblocks // splits))
    programs = max(1, num_programs) * max(1, -(-rblocks // rblocks_of_a_split))
    return programs / (-(-programs // num_places) * num_places)


def power_of_2(number: int) -> int:
    """The next one from `number` on."""
    return 1 << max(0, number - 1).bit_length()
