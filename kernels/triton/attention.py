"""MicroAttention on a GPU: packed sequences, each over its own scattered rBlocks, cut along the keys (split-KV).

A program serves one tile of query rows of one KV head over one split of the keys. The rows of a sequence are its query
heads of that KV head, token after token (GQA: they share every key that is read). Which sequence a tile belongs to
follows from `cu_queries` alone, so that the host launches without waiting for the GPU and a CUDA graph can replay it.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# How many rBlock starts are looked at in one step of the search for those that a tile sees.
STARTS_AT_ONCE = tl.constexpr(1024)
FAR = tl.constexpr(1 << 30)


@triton.jit
def sequence_of(tile, CU_QUERIES, num_sequences, G: tl.constexpr, BLOCK_M: tl.constexpr):
    """The last sequence whose tiles begin at or before `tile`: sequence s begins at rows(s) // BLOCK_M + s."""
    low = 0
    high = num_sequences
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(CU_QUERIES + middle) * G // BLOCK_M + middle <= tile:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def visible_rblocks(
    STARTS, count, lowest, highest, window, N: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr
):  # fmt: skip
    """Of `count` rBlocks, `[first, seen)` hold all that queries at positions lowest..highest see; `[first, whole)` are
    seen in full by every one of them. Exact for starts in ascending order; for others the range is only wider."""
    first = count
    seen = 0
    whole = count
    for base in range(0, count, STARTS_AT_ONCE):
        index = base + tl.arange(0, STARTS_AT_ONCE)
        start = tl.load(STARTS + index, mask=index < count, other=FAR).to(tl.int32)
        is_seen = index < count
        is_whole = is_seen
        if CAUSAL:
            is_seen = is_seen & (start <= highest)
            is_whole = is_whole & (start + N - 1 <= lowest)
        if WINDOWED:
            is_seen = is_seen & (start + N - 1 > lowest - window)
            is_whole = is_whole & (start > highest - window)
        first = tl.minimum(first, tl.min(tl.where(is_seen, index, count)))
        seen = tl.maximum(seen, tl.max(tl.where(is_seen, index + 1, 0)))
        whole = tl.minimum(whole, tl.min(tl.where(is_whole, count, index)))
    return first, seen, whole


@triton.jit
def attend(
    q, top, total, acc, begin, end, POOL, IDS, STARTS, K_SCALES, V_SCALES, position, scale, soft_cap, window,
    block_stride, v_offset, k_scales_stride, v_scales_stride,
    N: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, MASKED: tl.constexpr, EXACT: tl.constexpr,
    INT8: tl.constexpr,
):  # fmt: skip
    """Online softmax over rBlocks `begin`..`end` of the lists IDS and STARTS; `position` of every row.

    EXACT multiplies in fp32 without TF32. The interpreter needs it too: it takes bf16 for integers.
    """
    PRECISION: tl.constexpr = "ieee" if EXACT else "tf32"
    dims = tl.arange(0, D_PADDED)
    slots = tl.arange(0, BLOCK_N)
    has_dim = dims < D
    num_slots = end * N
    # The next rBlock's id is loaded an iteration ahead: a load that waits for another one stops the pipeline.
    next_id = tl.load(IDS + begin, mask=begin < end, other=0)
    for slot in tl.range(begin * N, num_slots, BLOCK_N):
        if N % BLOCK_N == 0:
            block = next_id
            following = (slot + BLOCK_N) // N
            next_id = tl.load(IDS + following, mask=following < end, other=0)
            K = POOL + block * block_stride
            offset = slot % N + slots
            rows = offset * D
            is_there = slots >= 0
        else:
            is_there = slot + slots < num_slots
            block = tl.load(IDS + (slot + slots) // N, mask=is_there, other=0)
            offset = (slot + slots) % N
            K = POOL
            rows = block * block_stride + offset * D
        is_key = is_there
        if MASKED:
            if N % BLOCK_N == 0:
                key_position = tl.load(STARTS + slot // N).to(tl.int32) + offset
            else:
                key_position = tl.load(STARTS + (slot + slots) // N, mask=is_there, other=0).to(tl.int32) + offset
            sees = is_there[None, :] & (position[:, None] >= 0)
            if CAUSAL:
                sees = sees & (key_position[None, :] <= position[:, None])
            if WINDOWED:
                sees = sees & (key_position[None, :] > position[:, None] - window)
            # Slots that nobody sees yet may hold anything, and 0 * NaN is NaN.
            is_key = tl.max(sees.to(tl.int32), axis=0) > 0
        if MASKED or N % BLOCK_N != 0 or D != D_PADDED:
            k = tl.load(K + rows[None, :] + dims[:, None], mask=is_key[None, :] & has_dim[:, None], other=0.0)
            v = tl.load(
                K + v_offset + rows[:, None] + dims[None, :], mask=is_key[:, None] & has_dim[None, :], other=0.0
            )
        else:
            k = tl.load(K + rows[None, :] + dims[:, None])
            v = tl.load(K + v_offset + rows[:, None] + dims[None, :])
        if EXACT:
            k = k.to(tl.float32)
            v = v.to(tl.float32)
        if INT8:
            k_scale = K_SCALES + block * k_scales_stride
            if N % BLOCK_N == 0:
                k *= tl.load(k_scale + dims, mask=has_dim, other=0.0)[:, None]
            else:
                k *= tl.load(k_scale[None, :] + dims[:, None], mask=has_dim[:, None], other=0.0)
        scores = tl.dot(q, k, input_precision=PRECISION)
        if CAPPED:
            # cap * tanh(s / cap), with tanh(x) = 1 - 2 / (e^2x + 1)
            scaled = scores * (scale / soft_cap)
            scores = soft_cap * (1.0 - 2.0 / (tl.exp2(scaled * (2.0 * LOG2_E)) + 1.0)) * LOG2_E
        else:
            scores = scores * (scale * LOG2_E)
        if MASKED:
            scores = tl.where(sees, scores, float("-inf"))
        elif N % BLOCK_N != 0:
            scores = tl.where(is_there[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        reached = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row without any key stays empty, not NaN
        weights = tl.exp2(scores - reached[:, None])
        shrink = tl.exp2(top - reached)
        total = total * shrink + tl.sum(weights, 1)
        if INT8:
            weights *= tl.load(V_SCALES + block * v_scales_stride + offset, mask=is_there, other=0.0)[None, :]
        acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        top = new_top
    return top, total, acc


@triton.jit
def attention_kernel(
    Q, POOL, IDS, STARTS, CU_BLOCKS, CU_QUERIES, POSITIONS, OUT, LSE, K_SCALES, V_SCALES,
    scale, soft_cap, window, num_sequences, num_splits,
    q_token_stride, q_head_stride, block_stride, head_stride, v_offset, out_split_stride, lse_split_stride,
    k_scales_stride, k_scales_head_stride, v_scales_stride, v_scales_head_stride,
    H: tl.constexpr, G: tl.constexpr, N: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, EXACT: tl.constexpr, INT8: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, KV heads, splits). OUT `[splits, T, H, D]` and LSE `[splits, T, H]`, both contiguous."""
    tile = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    s = sequence_of(tile, CU_QUERIES, num_sequences, G, BLOCK_M)
    first_token = tl.load(CU_QUERIES + s)
    num_rows = (tl.load(CU_QUERIES + s + 1) - first_token) * G
    row = (tile - (first_token * G // BLOCK_M + s)) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = row < num_rows
    if tl.max(is_row.to(tl.int32)) == 0:
        return
    token = first_token + row // G
    query_head = head * G + row % G
    dims = tl.arange(0, D_PADDED)
    is_element = is_row[:, None] & (dims < D)[None, :]
    q = tl.load(
        Q + token[:, None] * q_token_stride + query_head[:, None] * q_head_stride + dims[None, :],
        mask=is_element, other=0.0,
    )  # fmt: skip
    if EXACT:
        q = q.to(tl.float32)
    position = tl.load(POSITIONS + token, mask=is_row, other=-1).to(tl.int32)
    lowest = tl.min(tl.where(is_row, position, FAR))
    highest = tl.max(position)

    block_base = tl.load(CU_BLOCKS + s)
    num_blocks = (tl.load(CU_BLOCKS + s + 1) - block_base).to(tl.int32)
    ids = IDS + block_base
    starts = STARTS + block_base
    pool = POOL + head * head_stride
    k_scales = K_SCALES + head * k_scales_head_stride
    v_scales = V_SCALES + head * v_scales_head_stride
    first, seen, whole = visible_rblocks(starts, num_blocks, lowest, highest, window, N, CAUSAL, WINDOWED)
    share = tl.cdiv(tl.maximum(seen - first, 0), num_splits)
    begin = first + split * share
    end = tl.minimum(begin + share, seen)
    unmasked_end = tl.maximum(begin, tl.minimum(end, whole))

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D_PADDED], tl.float32)
    if not WINDOWED:
        top, total, acc = attend(
            q, top, total, acc, begin, unmasked_end, pool, ids, starts, k_scales, v_scales, position, scale,
            soft_cap, window, block_stride, v_offset, k_scales_stride, v_scales_stride,
            N, D, D_PADDED, BLOCK_N, CAUSAL, WINDOWED, CAPPED, False, EXACT, INT8,
        )  # fmt: skip
        begin = unmasked_end
    if CAUSAL or WINDOWED:
        top, total, acc = attend(
            q, top, total, acc, begin, end, pool, ids, starts, k_scales, v_scales, position, scale,
            soft_cap, window, block_stride, v_offset, k_scales_stride, v_scales_stride,
            N, D, D_PADDED, BLOCK_N, CAUSAL, WINDOWED, CAPPED, True, EXACT, INT8,
        )  # fmt: skip

    has_keys = total > 0
    safe = tl.where(has_keys, total, 1.0)
    out = acc / safe[:, None]
    lse = tl.where(has_keys, (top + tl.log2(safe)) * LN_2, float("-inf"))
    place = token * H + query_head
    tl.store(OUT + split * out_split_stride + place[:, None] * D + dims[None, :], out, mask=is_element)
    tl.store(LSE + split * lse_split_stride + place, lse, mask=is_row)
