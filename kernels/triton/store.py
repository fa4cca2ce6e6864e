"""New tokens' K and V into rBlocks, and rotary position embedding."""

import triton
import triton.language as tl


@triton.jit
def turned(row, x, cos_row, sin_row, dims, is_head, R: tl.constexpr):
    """x, loaded from `row`, in fp32: dim d of the first R meets its partner half of R away (rotate-half)."""
    is_left = dims < R // 2
    is_turned = dims < R
    partner = tl.where(is_left, dims + R // 2, dims - R // 2)
    other = tl.load(row + partner[None, :], mask=is_head & is_turned[None, :], other=0.0).to(tl.float32)
    cos = tl.load(cos_row + dims, mask=is_turned, other=1.0)
    sin = tl.load(sin_row + dims, mask=is_turned, other=0.0)
    return x.to(tl.float32) * cos[None, :] + tl.where(is_left, -1.0, 1.0)[None, :] * other * sin[None, :]


@triton.jit
def store_kv_kernel(
    K, V, POOL, SLOTS, COS, SIN, k_token_stride, k_head_stride, v_token_stride, v_head_stride,
    block_stride, head_stride, v_offset,
    KV_HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr, N: tl.constexpr, R: tl.constexpr,
    D: tl.constexpr, D_PADDED: tl.constexpr,
):  # fmt: skip
    """A program per token; POOL points at the layer. The first R dims of K are turned by COS and SIN; 0: none."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(SLOTS + token)
    heads = tl.arange(0, HEADS_PADDED)
    dims = tl.arange(0, D_PADDED)
    is_head = (heads < KV_HEADS)[:, None]
    is_element = is_head & (dims < D)[None, :]
    k_row = K + token * k_token_stride + heads[:, None] * k_head_stride
    k = tl.load(k_row + dims[None, :], mask=is_element)
    v = tl.load(V + token * v_token_stride + heads[:, None] * v_head_stride + dims[None, :], mask=is_element)
    place = POOL + slot // N * block_stride + heads[:, None] * head_stride + slot % N * D + dims[None, :]
    tl.store(place + v_offset, v.to(POOL.dtype.element_ty), mask=is_element)
    if R > 0:
        k = turned(k_row, k, COS + token * R, SIN + token * R, dims, is_head, R)
    tl.store(place, k.to(POOL.dtype.element_ty), mask=is_element)


@triton.jit
def rope_kernel(
    X, COS, SIN, OUT, x_token_stride, x_head_stride,
    H: tl.constexpr, H_PADDED: tl.constexpr, R: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr,
):  # fmt: skip
    """A program per token; COS, SIN and OUT are contiguous."""
    token = tl.program_id(0).to(tl.int64)
    heads = tl.arange(0, H_PADDED)
    dims = tl.arange(0, D_PADDED)
    is_head = (heads < H)[:, None]
    is_element = is_head & (dims < D)[None, :]
    row = X + token * x_token_stride + heads[:, None] * x_head_stride
    x = turned(row, tl.load(row + dims[None, :], mask=is_element), COS + token * R, SIN + token * R, dims, is_head, R)
    tl.store(OUT + (token * H + heads)[:, None] * D + dims[None, :], x.to(OUT.dtype.element_ty), mask=is_element)
