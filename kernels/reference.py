"""Every op in plain torch: the backend that runs anywhere, and the contract that faster ones are checked against.

Legend: T query tokens, H query heads, K KV heads, G = H / K, D head dim, L layers, B rBlocks, N tokens per rBlock,
S sequences, M rBlocks listed, P partials.
"""

import torch

# Scores of this many key tokens are held at one time, so that a long context needs no memory of its length squared.
KEY_TOKENS_AT_ONCE = 4096


def micro_attention(
    q_THD: torch.Tensor,
    pool_BLK2ND: torch.Tensor,
    layer: int,
    block_ids_M: torch.Tensor,
    block_starts_M: torch.Tensor,
    cu_blocks: torch.Tensor,
    cu_queries: torch.Tensor,
    positions_T: torch.Tensor,
    scale: float,
    causal: bool,
    window: int | None = None,
    soft_cap: float | None = None,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    out_THD, lse_TH = out or (torch.empty_like(x, dtype=torch.float32) for x in (q_THD, q_THD[..., 0]))
    out_THD.zero_()
    lse_TH.fill_(float("-inf"))
    blocks, queries, rblock_size = cu_blocks.tolist(), cu_queries.tolist(), pool_BLK2ND.shape[4]
    blocks_at_once = max(1, KEY_TOKENS_AT_ONCE // rblock_size)
    for s in range(len(blocks) - 1):
        rows, listed = slice(queries[s], queries[s + 1]), slice(blocks[s], blocks[s + 1])
        if rows.start == rows.stop or listed.start == listed.stop:
            continue
        pieces = (x[listed].split(blocks_at_once) for x in (block_ids_M, block_starts_M))
        for ids, starts in zip(*pieces, strict=True):
            hidden_TX = _hidden(positions_T[rows], starts, rblock_size, causal, window)
            kv_MK2ND = pool_BLK2ND[ids, layer].float()
            if scales is not None:
                kv_MK2ND[:, :, 0] *= scales[0][ids, layer][:, :, None, :]
                kv_MK2ND[:, :, 1] *= scales[1][ids, layer][:, :, :, None]
            piece = _over_blocks(q_THD[rows], kv_MK2ND, hidden_TX, scale, soft_cap)
            before = (out_THD[rows], lse_TH[rows])
            out_THD[rows], lse_TH[rows] = merge(*(torch.stack(pair) for pair in zip(before, piece, strict=True)))
    return out_THD, lse_TH


def _hidden(
    positions_T: torch.Tensor, starts_M: torch.Tensor, rblock_size: int, causal: bool, window: int | None
) -> torch.Tensor | None:
    """Which keys a query does not see, `[T, M * N]`; None where all see all."""
    if not causal and window is None:
        return None
    keys_X = (starts_M[:, None] + torch.arange(rblock_size, device=starts_M.device)).flatten()
    distance_TX = positions_T[:, None] - keys_X[None, :]
    hidden_TX = distance_TX < 0 if causal else torch.zeros_like(distance_TX, dtype=torch.bool)
    return hidden_TX if window is None else hidden_TX | (distance_TX >= window)


def _over_blocks(
    q_THD: torch.Tensor,
    kv_MK2ND: torch.Tensor,
    hidden_TX: torch.Tensor | None,
    scale: float,
    soft_cap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    num_tokens, num_heads, head_dim = q_THD.shape
    num_blocks, kv_heads, _, rblock_size, _ = kv_MK2ND.shape
    group = num_heads // kv_heads
    # Queries of one KV head side by side: [K, T * G, D]
    q_KRD = q_THD.to(torch.float32).view(num_tokens, kv_heads, group, head_dim).permute(1, 0, 2, 3)
    q_KRD = q_KRD.reshape(kv_heads, num_tokens * group, head_dim)
    k_KXD, v_KXD = (
        kv_MK2ND[:, :, part].transpose(0, 1).reshape(kv_heads, num_blocks * rblock_size, head_dim) for part in (0, 1)
    )
    scores_KRX = torch.bmm(q_KRD, k_KXD.transpose(1, 2)).mul_(scale)
    if soft_cap is not None:
        scores_KRX = scores_KRX.div_(soft_cap).tanh_().mul_(soft_cap)
    if hidden_TX is not None:
        scores_KRX.view(kv_heads, num_tokens, group, -1).masked_fill_(hidden_TX[None, :, None, :], float("-inf"))
        # Slots that nobody sees may hold anything, and 0 * NaN is NaN.
        v_KXD = v_KXD.masked_fill(hidden_TX.all(dim=0)[None, :, None], 0.0)
    top_KR1 = scores_KRX.amax(dim=-1, keepdim=True)
    top_KR1 = top_KR1.masked_fill(top_KR1 == float("-inf"), 0.0)  # a row without any key stays empty, not NaN
    weights_KRX = scores_KRX.sub_(top_KR1).exp_()
    sum_KR1 = weights_KRX.sum(dim=-1, keepdim=True)
    out_KRD = torch.bmm(weights_KRX, v_KXD) / sum_KR1.clamp_min(torch.finfo(torch.float32).tiny)
    lse_KR = (sum_KR1.log() + top_KR1).squeeze(-1)
    out_THD = out_KRD.view(kv_heads, num_tokens, group, head_dim).permute(1, 0, 2, 3).reshape_as(q_THD)
    return out_THD, lse_KR.view(kv_heads, num_tokens, group).permute(1, 0, 2).reshape(num_tokens, num_heads)


def merge(
    outs_PTHD: torch.Tensor, lses_PTH: torch.Tensor, out: tuple[torch.Tensor, torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    lse_TH = torch.logsumexp(lses_PTH, dim=0)
    weights_PTH = (lses_PTH - lse_TH.masked_fill(lse_TH == float("-inf"), 0.0)).exp()
    out_THD = (outs_PTHD * weights_PTH.unsqueeze(-1)).sum(dim=0)
    return (out_THD, lse_TH) if out is None else (out[0].copy_(out_THD), out[1].copy_(lse_TH))


def store_kv(
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    pool_BLK2ND: torch.Tensor,
    layer: int,
    slot_mapping_T: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    if angles is not None:
        k_TKD = _turned(k_TKD, *angles)
    rblock_size = pool_BLK2ND.shape[4]
    blocks, slots = slot_mapping_T // rblock_size, slot_mapping_T % rblock_size
    pool_BLK2ND[blocks, layer, :, 0, slots] = k_TKD.to(pool_BLK2ND.dtype)
    pool_BLK2ND[blocks, layer, :, 1, slots] = v_TKD.to(pool_BLK2ND.dtype)


def apply_rope(x_THD: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor) -> torch.Tensor:
    return _turned(x_THD, cos_TR, sin_TR).to(x_THD.dtype)


def _turned(x_THD: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor) -> torch.Tensor:
    """In fp32, not rounded yet."""
    x_THD = x_THD.to(torch.float32)
    rotated = cos_TR.shape[-1]
    x = x_THD[..., :rotated]
    left, right = x.chunk(2, dim=-1)
    turned = x * cos_TR[:, None] + torch.cat((-right, left), dim=-1) * sin_TR[:, None]
    return torch.cat((turned, x_THD[..., rotated:]), dim=-1)


def gather_rblocks(pool_BLK2ND: torch.Tensor, block_ids: torch.Tensor) -> torch.Tensor:
    return pool_BLK2ND.index_select(0, block_ids)


def scatter_rblocks(data_MLK2ND: torch.Tensor, pool_BLK2ND: torch.Tensor, block_ids: torch.Tensor) -> None:
    pool_BLK2ND.index_copy_(0, block_ids, data_MLK2ND)


def tile_backward(
    d_out_SBHD: torch.Tensor,
    q_SBHD: torch.Tensor,
    k_XBKD: torch.Tensor,
    v_XBKD: torch.Tensor,
    out_SBHD: torch.Tensor,
    lse_SBH: torch.Tensor,
    scale: float,
    is_causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """With the scores of the whole tile in memory."""
    kv_heads = k_XBKD.shape[2]
    q, d_out, out = (x.to(lse_SBH.dtype).unflatten(2, (kv_heads, -1)) for x in (q_SBHD, d_out_SBHD, out_SBHD))
    k, v = (x.to(lse_SBH.dtype) for x in (k_XBKD, v_XBKD))
    scores = torch.einsum("sbkgd,xbkd->bkgsx", q, k) * scale
    if is_causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    lse_BKGS = lse_SBH.unflatten(2, (kv_heads, -1)).permute(1, 2, 3, 0)
    weights = (scores - lse_BKGS[..., None]).exp()
    delta_BKGS = (d_out * out).sum(-1).permute(1, 2, 3, 0)
    d_scores = weights * (torch.einsum("sbkgd,xbkd->bkgsx", d_out, v) - delta_BKGS[..., None]) * scale
    d_q = torch.einsum("bkgsx,xbkd->sbkgd", d_scores, k).flatten(2, 3)
    d_k = torch.einsum("bkgsx,sbkgd->xbkd", d_scores, q)
    return d_q, d_k, torch.einsum("bkgsx,sbkgd->xbkd", weights, d_out)


def sample(
    logits_RV: torch.Tensor,
    temperature_R: torch.Tensor,
    top_k_R: torch.Tensor,
    top_p_R: torch.Tensor,
    min_p_R: torch.Tensor,
    uniform_R: torch.Tensor,
) -> torch.Tensor:
    logits_RV = logits_RV.float()
    is_finite_R = logits_RV.isfinite().all(dim=-1)
    weights_RV = kept_weights(logits_RV, temperature_R, top_k_R, top_p_R, min_p_R).double().nan_to_num()
    sums_RV = weights_RV.cumsum(dim=-1)
    targets_R1 = (uniform_R.to(sums_RV) * sums_RV[:, -1])[:, None]
    drawn_R = torch.searchsorted(sums_RV, targets_R1, right=True)[:, 0]
    last_R = logits_RV.shape[1] - 1 - (weights_RV > 0).flip(-1).int().argmax(dim=-1)  # sums are rounded
    greedy_R = logits_RV.argmax(dim=-1)
    token_id_R = torch.where(temperature_R.to(greedy_R.device) == 0, greedy_R, torch.minimum(drawn_R, last_R))
    return token_id_R.masked_fill(~is_finite_R, -1)


def kept_weights(
    logits_RV: torch.Tensor,
    temperature_R: torch.Tensor,
    top_k_R: torch.Tensor,
    top_p_R: torch.Tensor,
    min_p_R: torch.Tensor,
) -> torch.Tensor:
    """e^((logit - largest) / temperature) of the tokens that may be drawn, 0 of the others; rows with 0 as with 1."""
    temperature, top_k, top_p, min_p = (
        x.to(logits_RV.device)[:, None] for x in (temperature_R, top_k_R, top_p_R, min_p_R)
    )
    temperature = torch.where(temperature == 0, 1.0, temperature)
    weights_RV = ((logits_RV - logits_RV.amax(dim=-1, keepdim=True)) / temperature).exp()
    vocabulary = logits_RV.shape[1]
    top_k = torch.where((top_k <= 0) | (top_k > vocabulary), vocabulary, top_k)
    ordered_RV, order_RV = weights_RV.sort(dim=-1, descending=True, stable=True)
    ordered_RV = ordered_RV.masked_fill(ordered_RV < ordered_RV.gather(-1, top_k - 1), 0.0)
    before_RV = ordered_RV.double().cumsum(dim=-1) - ordered_RV
    is_over = before_RV >= top_p.double() * ordered_RV.double().sum(dim=-1, keepdim=True)
    is_over[:, 0] = False  # the likeliest stays, however small top_p is
    ordered_RV = ordered_RV.masked_fill((is_over & (top_p < 1.0)) | (ordered_RV < min_p), 0.0)
    return torch.zeros_like(weights_RV).scatter_(-1, order_RV, ordered_RV)
