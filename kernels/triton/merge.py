"""Exact merge of partial results by log-sum-exp."""

import triton
import triton.language as tl


@triton.jit
def merge_kernel(
    OUTS, LSES, OUT, LSE, num_partials, num_rows,
    D: tl.constexpr, D_PADDED: tl.constexpr, P_PADDED: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """OUTS `[P, rows, D]` and LSES `[P, rows]` into OUT `[rows, D]` and LSE `[rows]`, all fp32 and contiguous.

    All LSEs are read first, so that no partial waits for the one before: BLOCK_P of them are read at once.
    """
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    is_row = row < num_rows
    dims = tl.arange(0, D_PADDED)
    every = tl.arange(0, P_PADDED)[:, None]
    lses = tl.load(
        LSES + every * num_rows + row[None, :], mask=(every < num_partials) & is_row[None, :], other=float("-inf")
    )
    top = tl.max(lses, 0)
    reached = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp(lses - reached[None, :]), 0)
    acc = tl.zeros([BLOCK_P, BLOCK_R, D_PADDED], tl.float32)
    for base in range(0, num_partials, BLOCK_P):
        partial = base + tl.arange(0, BLOCK_P)[:, None]
        place = partial * num_rows + row[None, :]
        is_there = (partial < num_partials) & is_row[None, :]
        weight = tl.exp(tl.load(LSES + place, mask=is_there, other=float("-inf")) - reached[None, :])
        is_element = is_there[:, :, None] & (dims < D)[None, None, :]
        out = tl.load(OUTS + place[:, :, None] * D + dims[None, None, :], mask=is_element, other=0.0)
        acc += out * weight[:, :, None]
    has_keys = total > 0
    safe = tl.where(has_keys, total, 1.0)
    is_element = is_row[:, None] & (dims < D)[None, :]
    tl.store(OUT + row[:, None] * D + dims[None, :], tl.sum(acc, 0) / safe[:, None], mask=is_element)
    tl.store(LSE + row, tl.where(has_keys, top + tl.log(safe), float("-inf")), mask=is_row)
