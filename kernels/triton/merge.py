"""Exact merge of partial results by log-sum-exp."""

import triton
import triton.language as tl


@triton.jit
def merge_kernel(
    OUTS, LSES, OUT, LSE, num_partials, num_rows,
    D: tl.constexpr, D_PADDED: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """OUTS `[P, rows, D]` and LSES `[P, rows]` into OUT `[rows, D]` and LSE `[rows]`, all fp32 and contiguous."""
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    is_row = row < num_rows
    dims = tl.arange(0, D_PADDED)
    is_element = is_row[:, None] & (dims < D)[None, :]
    top = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, D_PADDED], tl.float32)
    for partial in range(num_partials):
        lse = tl.load(LSES + partial * num_rows + row, mask=is_row, other=float("-inf"))
        out = tl.load(OUTS + (partial * num_rows + row)[:, None] * D + dims[None, :], mask=is_element, other=0.0)
        new_top = tl.maximum(top, lse)
        reached = tl.where(new_top == float("-inf"), 0.0, new_top)
        shrink = tl.exp(top - reached)
        weight = tl.exp(lse - reached)
        acc = acc * shrink[:, None] + out * weight[:, None]
        total = total * shrink + weight
        top = new_top
    has_keys = total > 0
    safe = tl.where(has_keys, total, 1.0)
    tl.store(OUT + row[:, None] * D + dims[None, :], acc / safe[:, None], mask=is_element)
    tl.store(LSE + row, tl.where(has_keys, top + tl.log(safe), float("-inf")), mask=is_row)
