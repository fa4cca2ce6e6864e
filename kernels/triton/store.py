"""New tokens' K and V into rBlocks, and rotary position embedding."""

import triton
import triton.language as tl


@triton.jit
def store_kv_kernel(
    K, V, POOL, SLOTS, k_token_stride, k_head_stride, v_token_stride, v_head_stride,
    block_stride, head_stride, v_offset,
    KV_HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr, N: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr,
):  # fmt: skip
    """A program per token; POOL points at the layer."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(SLOTS + token)
    heads = tl.arange(0, HEADS_PADDED)
    dims = tl.arange(0, D_PADDED)
    is_element = (heads < KV_HEADS)[:, None] & (dims < D)[None, :]
    k = tl.load(K + token * k_token_stride + heads[:, None] * k_head_stride + dims[None, :], mask=is_element)
    v = tl.load(V + token * v_token_stride + heads[:, None] * v_head_stride + dims[None, :], mask=is_element)
    place = POOL + slot // N * block_stride + heads[:, None] * head_stride + slot % N * D + dims[None, :]
    tl.store(place, k.to(POOL.dtype.element_ty), mask=is_element)
    tl.store(place + v_offset, v.to(POOL.dtype.element_ty), mask=is_element)


@triton.jit
def rope_kernel(
    X, COS, SIN, OUT, x_token_stride, x_head_stride, angle_stride,
    H: tl.constexpr, H_PADDED: tl.constexpr, R: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr,
):  # fmt: skip
    """A program per token. Dim d of the first R meets its partner half of R away (rotate-half); OUT is contiguous."""
    token = tl.program_id(0).to(tl.int64)
    heads = tl.arange(0, H_PADDED)
    dims = tl.arange(0, D_PADDED)
    is_left = dims < R // 2
    is_turned = dims < R
    partner = tl.where(is_left, dims + R // 2, dims - R // 2)
    row = X + token * x_token_stride + heads[:, None] * x_head_stride
    is_head = (heads < H)[:, None]
    is_element = is_head & (dims < D)[None, :]
    x = tl.load(row + dims[None, :], mask=is_element).to(tl.float32)
    other = tl.load(row + partner[None, :], mask=is_head & is_turned[None, :], other=0.0).to(tl.float32)
    cos = tl.load(COS + token * angle_stride + dims, mask=is_turned, other=1.0)
    sin = tl.load(SIN + token * angle_stride + dims, mask=is_turned, other=0.0)
    turned = x * cos[None, :] + tl.where(is_left, -1.0, 1.0)[None, :] * other * sin[None, :]
    tl.store(OUT + (token * H + heads)[:, None] * D + dims[None, :], turned.to(OUT.dtype.element_ty), mask=is_element)
