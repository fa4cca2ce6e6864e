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
    STARTS, begin, end, lowest, highest, window, N: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr
):  # fmt: skip
    """Of rBlocks `begin`..`end`, `[first, seen)` hold all that queries at positions lowest..highest see; those of
    `[whole, whole_end)` within them are seen in full by every query. Exact for starts in ascending order; for others
    the first range is only wider and the second shorter."""
    first = begin
    seen = begin
    whole = begin
    whole_end = end
    if WINDOWED:
        first = end
        whole = end
    for base in range(begin, end, STARTS_AT_ONCE):
        index = base + tl.arange(0, STARTS_AT_ONCE)
        start = tl.load(STARTS + index, mask=index < end, other=FAR).to(tl.int32)
        is_seen = index < end
        is_whole = is_seen
        if CAUSAL:
            is_seen = is_seen & (start <= highest)
            is_whole = is_whole & (start + N - 1 <= lowest)
        if WINDOWED:
            is_seen = is_seen & (start + N - 1 > lowest - window)
            is_whole = is_whole & (start > highest - window)
            first = tl.minimum(first, tl.min(tl.where(is_seen, index, end)))
            whole = tl.minimum(whole, tl.min(tl.where(is_whole, index, end)))
        else:
            whole_end = tl.minimum(whole_end, tl.min(tl.where(is_whole, end, index)))
        seen = tl.maximum(seen, tl.max(tl.where(is_seen, index + 1, begin)))
    if WINDOWED:
        for base in range(whole, end, STARTS_AT_ONCE):
            index = base + tl.arange(0, STARTS_AT_ONCE)
            start = tl.load(STARTS + index, mask=index < end, other=FAR).to(tl.int32)
            is_whole = (index < end) & (start > highest - window)
            if CAUSAL:
                is_whole = is_whole & (start + N - 1 <= lowest)
            whole_end = tl.minimum(whole_end, tl.min(tl.where(is_whole, end, index)))
    return first, seen, whole, whole_end


@triton.jit
def attend(
    q, top, total, acc, begin, end, hole, hole_end, POOL, IDS, STARTS, K_SCALES, V_SCALES,
    position, highest, scale, soft_cap, window,
    block_stride, v_offset, k_scales_stride, v_scales_stride,
    N: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, MASKED: tl.constexpr, EXACT: tl.constexpr,
    INT8: tl.constexpr,
):  # fmt: skip
    """Online softmax over rBlocks `begin`..`end`, less `hole`..`hole_end` where MASKED, of the lists IDS and STARTS;
    `position` of every row, `highest` of all.

    `total` is `[BLOCK_M, 1]`, or, in small tiles, `[BLOCK_M, BLOCK_N]`: there rows are spread over warps, and to sum
    them up in every step would be three barriers more than once at the end.
    EXACT multiplies in fp32 without TF32. The interpreter needs it too: it takes bf16 for integers.
    """
    PRECISION: tl.constexpr = "ieee" if EXACT else "tf32"
    # An int8 number is exact in bf16, and bf16 has the range of fp32 for the scales.
    WIDE: tl.constexpr = tl.float32 if EXACT else (tl.bfloat16 if INT8 else POOL.dtype.element_ty)
    IS_EVEN: tl.constexpr = N % BLOCK_N == 0  # a step reads from one rBlock only
    # The scales of K's channels go where there is less to multiply per step: few query rows, or BLOCK_N keys.
    SCALES_Q: tl.constexpr = INT8 and IS_EVEN and BLOCK_M < BLOCK_N
    dims = tl.arange(0, D_PADDED)
    slots = tl.arange(0, BLOCK_N)
    has_dim = dims < D
    num_slots = end * N
    skipped = 0
    if MASKED:
        skipped = hole_end - hole
    # The next rBlock's id is loaded an iteration ahead: a load that waits for another one stops the pipeline.
    following = begin
    if MASKED:
        following += tl.where(begin >= hole, skipped, 0)
    next_id = tl.load(IDS + following, mask=following < end, other=0)
    for visited in tl.range(begin * N, num_slots - skipped * N, BLOCK_N):
        slot = visited if IS_EVEN else visited + slots
        if MASKED:
            slot += tl.where(slot >= hole * N, skipped * N, 0)
        if IS_EVEN:
            block = next_id
            following = (visited + BLOCK_N) // N
            if MASKED:
                following += tl.where(following >= hole, skipped, 0)
            next_id = tl.load(IDS + following, mask=following < end, other=0)
            K = POOL + block * block_stride
            offset = slots if N == BLOCK_N else slot % N + slots
            rows = offset * D
            is_there = slots >= 0
        else:
            is_there = slot < num_slots
            block = tl.load(IDS + slot // N, mask=is_there, other=0)
            offset = slot % N
            K = POOL
            rows = block * block_stride + offset * D
        is_key = is_there
        if MASKED:
            if IS_EVEN:
                key_position = tl.load(STARTS + slot // N).to(tl.int32) + offset
            else:
                key_position = tl.load(STARTS + slot // N, mask=is_there, other=0).to(tl.int32) + offset
            # Slots that nobody sees yet may hold anything, and 0 * NaN is NaN.
            if WINDOWED:
                sees = is_there[None, :] & (position[:, None] >= 0)
                sees = sees & (key_position[None, :] > position[:, None] - window)
                if CAUSAL:
                    sees = sees & (key_position[None, :] <= position[:, None])
                is_key = tl.max(sees.to(tl.int32), axis=0) > 0
            else:
                sees = key_position[None, :] <= position[:, None]
                if not IS_EVEN:
                    sees = sees & is_there[None, :]
                is_key = is_there & (key_position <= highest)
        # K needs no mask for keys that are there: what nobody sees is overwritten below.
        if IS_EVEN and D == D_PADDED:
            k = tl.load(K + rows[None, :] + dims[:, None])
        else:
            k = tl.load(K + rows[None, :] + dims[:, None], mask=is_there[None, :] & has_dim[:, None], other=0.0)
        if MASKED or not IS_EVEN or D != D_PADDED:
            v = tl.load(
                K + v_offset + rows[:, None] + dims[None, :], mask=is_key[:, None] & has_dim[None, :], other=0.0
            )
        else:
            v = tl.load(K + v_offset + rows[:, None] + dims[None, :])
        scaled_q = q
        if INT8:
            if IS_EVEN:
                factor = tl.load(K_SCALES + block * k_scales_stride + dims, mask=has_dim, other=0.0)[:, None]
            else:
                factor = tl.load(
                    K_SCALES + (block * k_scales_stride)[None, :] + dims[:, None], mask=has_dim[:, None], other=0.0
                )
            if SCALES_Q:
                scaled_q = (q.to(tl.float32) * factor.reshape(1, D_PADDED)).to(WIDE)
            else:
                k = k.to(tl.float32) * factor
        scores = tl.dot(scaled_q, k.to(WIDE), input_precision=PRECISION)
        if CAPPED:
            # cap * tanh(s / cap), with tanh(x) = 1 - 2 / (e^2x + 1)
            scaled = scores * (scale / soft_cap)
            scores = soft_cap * (1.0 - 2.0 / (tl.exp2(scaled * (2.0 * LOG2_E)) + 1.0))
        if MASKED:
            scores = tl.where(sees, scores, float("-inf"))
        elif not IS_EVEN:
            scores = tl.where(is_there[None, :], scores, float("-inf"))
        # The scale (> 0) is multiplied in after the maximum, together with the subtraction.
        exponent = LOG2_E if CAPPED else scale * LOG2_E
        new_top = tl.maximum(top, tl.max(scores, 1) * exponent)
        reached = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row without any key stays empty, not NaN
        weights = tl.exp2(scores * exponent - reached[:, None])
        shrink = tl.exp2(top - reached)
        if total.shape[1] == 1:
            total = total * shrink[:, None] + tl.sum(weights, 1)[:, None]
        else:
            total = total * shrink[:, None] + weights
        if INT8:
            weights *= tl.load(V_SCALES + block * v_scales_stride + offset, mask=is_there, other=0.0)[None, :]
        acc = acc * shrink[:, None] + tl.dot(weights.to(WIDE), v.to(WIDE), input_precision=PRECISION)
        top = new_top
    return top, total, acc


@triton.jit(do_not_specialize=["num_heads", "num_sequences", "num_splits", "window"])
def attention_kernel(
    Q, POOL, IDS, STARTS, CU_BLOCKS, CU_QUERIES, POSITIONS, OUT, LSE, K_SCALES, V_SCALES,
    scale, soft_cap, window, num_heads, num_sequences, num_splits,
    q_token_stride, q_head_stride, block_stride, head_stride, v_offset, out_split_stride, lse_split_stride,
    k_scales_stride, k_scales_head_stride, v_scales_stride, v_scales_head_stride,
    G: tl.constexpr, N: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, EXACT: tl.constexpr, INT8: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, KV heads, splits). OUT `[splits, T, H, D]` and LSE `[splits, T, H]`, both contiguous."""
    # Tiles at a sequence's end see most keys: they start first, so that the short ones fill the gaps at the end.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    s = sequence_of(tile, CU_QUERIES, num_sequences, G, BLOCK_M)
    first_token = tl.load(CU_QUERIES + s)
    num_rows = (tl.load(CU_QUERIES + s + 1) - first_token) * G
    block_base = tl.load(CU_BLOCKS + s)
    num_blocks = (tl.load(CU_BLOCKS + s + 1) - block_base).to(tl.int32)
    first_row = ((tile - (first_token * G // BLOCK_M + s)) * BLOCK_M).to(tl.int32)
    if first_row >= num_rows:
        return
    row = first_row + tl.arange(0, BLOCK_M)
    is_row = row < num_rows
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
    elif INT8:
        q = q.to(tl.bfloat16)
    position = tl.load(POSITIONS + token, mask=is_row, other=-1).to(tl.int32)
    lowest = tl.min(tl.where(is_row, position, FAR))
    highest = tl.max(position)

    ids = IDS + block_base
    starts = STARTS + block_base
    pool = POOL + head * head_stride
    k_scales = K_SCALES + head * k_scales_head_stride
    v_scales = V_SCALES + head * v_scales_head_stride
    # A window leaves most rBlocks out, so splits share the rest; else each looks at the starts of its own share only.
    begin = 0
    end = num_blocks
    whole = 0
    whole_end = num_blocks
    if WINDOWED:
        begin, end, whole, whole_end = visible_rblocks(
            starts, 0, num_blocks, lowest, highest, window, N, CAUSAL, True
        )  # fmt: skip
    share = tl.cdiv(tl.maximum(end - begin, 0), num_splits)
    begin += split * share
    end = tl.minimum(begin + share, end)
    if CAUSAL and not WINDOWED:
        begin, end, whole, whole_end = visible_rblocks(starts, begin, end, lowest, highest, window, N, True, False)
    whole = tl.minimum(tl.maximum(whole, begin), tl.maximum(begin, end))
    whole_end = tl.minimum(tl.maximum(whole_end, whole), tl.maximum(begin, end))

    SUMS: tl.constexpr = BLOCK_N if BLOCK_M < 64 else 1
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M, SUMS], tl.float32)
    acc = tl.zeros([BLOCK_M, D_PADDED], tl.float32)
    top, total, acc = attend(
        q, top, total, acc, whole, whole_end, 0, 0, pool, ids, starts, k_scales, v_scales,
        position, highest, scale, soft_cap, window, block_stride, v_offset, k_scales_stride, v_scales_stride,
        N, D, D_PADDED, BLOCK_M, BLOCK_N, CAUSAL, WINDOWED, CAPPED, False, EXACT, INT8,
    )  # fmt: skip
    if CAUSAL or WINDOWED:
        top, total, acc = attend(
            q, top, total, acc, begin, end, whole, whole_end, pool, ids, starts, k_scales, v_scales,
            position, highest, scale, soft_cap, window, block_stride, v_offset, k_scales_stride, v_scales_stride,
            N, D, D_PADDED, BLOCK_M, BLOCK_N, CAUSAL, WINDOWED, CAPPED, True, EXACT, INT8,
        )  # fmt: skip

    sums = tl.sum(total, 1)
    has_keys = sums > 0
    safe = tl.where(has_keys, sums, 1.0)
    out = acc / safe[:, None]
    lse = tl.where(has_keys, (top + tl.log2(safe)) * LN_2, float("-inf"))
    place = token * num_heads + query_head
    tl.store(OUT + split * out_split_stride + place[:, None] * D + dims[None, :], out, mask=is_element)
    tl.store(LSE + split * lse_split_stride + place, lse, mask=is_row)
