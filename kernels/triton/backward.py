"""Gradients of one tile of attention: its keys against queries whose global LSE is known.

With p = exp(scale q k - lse) and delta = sum(d_out * out), both over all keys and not the tile's alone,

    d_v = p^T d_out        d_s = p (d_out v^T - delta)        d_k = scale d_s^T q        d_q = scale d_s k

which is exact tile by tile: the gradients of q are summed over tiles, those of k and v stay where the tile lies.
Source: FlashAttention-2 (arXiv 2307.08691), its backward pass. Legend: S queries, X keys, B sequences, H query heads,
K KV heads, G = H / K, D head dim; causal means S = X, the same tokens.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def key_gradients_kernel(
    Q, K, V, D_OUT, LSE, DELTA, D_K, D_V, scale, num_queries, num_keys,
    q_token_stride, q_sequence_stride, q_head_stride, k_token_stride, k_sequence_stride, k_head_stride,
    v_token_stride, v_sequence_stride, v_head_stride, d_token_stride, d_sequence_stride, d_head_stride,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of keys, K, B). LSE and DELTA `[S, B, H]`, D_K and D_V `[X, B, K, D]`, fp32 and contiguous."""
    PRECISION: tl.constexpr = "ieee" if EXACT else "tf32"
    head = tl.program_id(1).to(tl.int64)
    sequence = tl.program_id(2).to(tl.int64)
    key = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, D_PADDED)
    is_key = (key < num_keys)[:, None] & (dims < D)[None, :]
    k_base = K + sequence * k_sequence_stride + head * k_head_stride
    v_base = V + sequence * v_sequence_stride + head * v_head_stride
    k = tl.load(k_base + key[:, None] * k_token_stride + dims[None, :], mask=is_key, other=0.0)
    v = tl.load(v_base + key[:, None] * v_token_stride + dims[None, :], mask=is_key, other=0.0)
    if EXACT:
        k = k.to(tl.float32)
        v = v.to(tl.float32)
    d_k = tl.zeros([BLOCK_N, D_PADDED], tl.float32)
    d_v = tl.zeros([BLOCK_N, D_PADDED], tl.float32)
    # Queries before the first key of a causal tile do not see it.
    first = tl.program_id(0) * BLOCK_N // BLOCK_M * BLOCK_M if CAUSAL else 0
    num_sequences = tl.num_programs(2)
    # A block's own place is one 64-bit number; within it 32 bits do, which halves the registers that addresses take.
    lanes = tl.arange(0, BLOCK_M)
    q_places = lanes[:, None] * q_token_stride + dims[None, :]
    d_places = lanes[:, None] * d_token_stride + dims[None, :]
    for member in range(G):
        query_head = head * G + member
        q_base = Q + sequence * q_sequence_stride + query_head * q_head_stride
        d_base = D_OUT + sequence * d_sequence_stride + query_head * d_head_stride
        row_base = sequence * H + query_head
        for begin in tl.range(first, num_queries, BLOCK_M):
            block = tl.cast(begin, tl.int64)
            query = begin + lanes
            is_there = query < num_queries
            is_query = is_there[:, None] & (dims < D)[None, :]
            rows = row_base + block * num_sequences * H + lanes * num_sequences * H
            q = tl.load(q_base + block * q_token_stride + q_places, mask=is_query, other=0.0)
            d_out = tl.load(d_base + block * d_token_stride + d_places, mask=is_query, other=0.0)
            lse = tl.load(LSE + rows, mask=is_there, other=float("inf"))
            delta = tl.load(DELTA + rows, mask=is_there, other=0.0)
            if EXACT:
                q = q.to(tl.float32)
                d_out = d_out.to(tl.float32)
            scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2_E)
            weights = tl.exp2(scores - (lse * LOG2_E)[None, :])
            if CAUSAL:
                weights = tl.where(key[:, None] <= query[None, :], weights, 0.0)
            d_v += tl.dot(weights.to(d_out.dtype), d_out, input_precision=PRECISION)
            d_weights = tl.dot(v, tl.trans(d_out), input_precision=PRECISION)
            d_scores = weights * (d_weights - delta[None, :])
            d_k += tl.dot(d_scores.to(q.dtype), q, input_precision=PRECISION)
    place = ((key * num_sequences + sequence) * (H // G) + head)[:, None] * D + dims[None, :]
    tl.store(D_K + place, d_k * scale, mask=is_key)
    tl.store(D_V + place, d_v, mask=is_key)


@triton.jit
def query_gradients_kernel(
    Q, K, V, D_OUT, LSE, DELTA, D_Q, scale, num_queries, num_keys,
    q_token_stride, q_sequence_stride, q_head_stride, k_token_stride, k_sequence_stride, k_head_stride,
    v_token_stride, v_sequence_stride, v_head_stride, d_token_stride, d_sequence_stride, d_head_stride,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of queries, H, B). D_Q `[S, B, H, D]`, fp32 and contiguous."""
    PRECISION: tl.constexpr = "ieee" if EXACT else "tf32"
    query_head = tl.program_id(1).to(tl.int64)
    sequence = tl.program_id(2).to(tl.int64)
    query = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, D_PADDED)
    is_query = (query < num_queries)[:, None] & (dims < D)[None, :]
    q_base = Q + sequence * q_sequence_stride + query_head * q_head_stride
    d_base = D_OUT + sequence * d_sequence_stride + query_head * d_head_stride
    row = (query * tl.num_programs(2) + sequence) * H + query_head
    q = tl.load(q_base + query[:, None] * q_token_stride + dims[None, :], mask=is_query, other=0.0)
    d_out = tl.load(d_base + query[:, None] * d_token_stride + dims[None, :], mask=is_query, other=0.0)
    lse = tl.load(LSE + row, mask=query < num_queries, other=float("inf"))
    delta = tl.load(DELTA + row, mask=query < num_queries, other=0.0)
    if EXACT:
        q = q.to(tl.float32)
        d_out = d_out.to(tl.float32)
    d_q = tl.zeros([BLOCK_M, D_PADDED], tl.float32)
    end = tl.minimum(num_keys, (tl.program_id(0) + 1) * BLOCK_M) if CAUSAL else num_keys
    k_base = K + sequence * k_sequence_stride + query_head // G * k_head_stride
    v_base = V + sequence * v_sequence_stride + query_head // G * v_head_stride
    for begin in tl.range(0, end, BLOCK_N):
        key = begin + tl.arange(0, BLOCK_N)
        is_key = (key < num_keys)[:, None] & (dims < D)[None, :]
        k = tl.load(k_base + key[:, None] * k_token_stride + dims[None, :], mask=is_key, other=0.0)
        v = tl.load(v_base + key[:, None] * v_token_stride + dims[None, :], mask=is_key, other=0.0)
        if EXACT:
            k = k.to(tl.float32)
            v = v.to(tl.float32)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2_E)
        weights = tl.exp2(scores - (lse * LOG2_E)[:, None])
        if CAUSAL:
            weights = tl.where(key[None, :] <= query[:, None], weights, 0.0)
        d_weights = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)
        d_scores = weights * (d_weights - delta[:, None])
        d_q += tl.dot(d_scores.to(k.dtype), k, input_precision=PRECISION)
    tl.store(D_Q + row[:, None] * D + dims[None, :], d_q * scale, mask=is_query)
