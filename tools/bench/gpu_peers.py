"""What DistAttention is measured against on a GPU: torch's attention and installed libraries, which get dense KV."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from megatron_distkv.ops import use_backend
from tools.bench.gpu_batch import GROUP, HEAD_DIM, Batch
from tools.bench.gpu_timing import Work


def usable(peers: dict[str, Work]) -> tuple[dict[str, Work], dict[str, str]]:
    """Those that run, and why the others do not: one that lacks memory or a kernel must not cost us our own figure."""
    found, left_out = {}, {}
    for name, peer in peers.items():
        try:
            peer()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        except Exception as error:
            left_out[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        else:
            found[name] = peer
    return found, left_out


def decode_peers(case: Batch, k_BKXD: torch.Tensor, v_BKXD: torch.Tensor, libraries: Sequence[str]) -> dict[str, Work]:
    q = case.q.view(case.batch, case.kv_heads * GROUP, 1, HEAD_DIM)
    return {
        "torch sdpa, dense KV": lambda: F.scaled_dot_product_attention(q, k_BKXD, v_BKXD, enable_gqa=True),
        **_installed_decodes(case, k_BKXD, v_BKXD),
        **{f"backend {name}, same rBlocks": _backend(name, case) for name in libraries},
    }


def _backend(backend: str, case: Batch) -> Work:
    """Decode by this backend, wrong answers refused the first time; rBlocks are full, so the library has all of it."""
    checked = []

    def attend() -> tuple[torch.Tensor, torch.Tensor]:
        use_backend(backend)
        try:
            found = case.attend()
        finally:
            use_backend("triton")
        if not checked:
            case.check(found)
            checked.append(True)
        return found

    return attend


def _installed_decodes(case: Batch, k: torch.Tensor, v: torch.Tensor) -> dict[str, Work]:
    """On dense KV."""
    found: dict[str, Work] = {}
    q, wide_k, wide_v = case.q[:, None], k.transpose(1, 2), v.transpose(1, 2)
    try:
        from flash_attn import flash_attn_with_kvcache
    except ImportError:
        pass
    else:
        found["flash-attn, dense KV"] = lambda: flash_attn_with_kvcache(q, wide_k, wide_v, causal=True)
    try:
        import flashinfer
    except ImportError:
        return found
    if case.batch == 1:
        found["FlashInfer, dense KV"] = lambda: flashinfer.single_decode_with_kv_cache(case.q[0], wide_k[0], wide_v[0])
    return found


def prefill_peers(case: Batch) -> dict[str, Work]:
    k, v = case.dense_kv()
    q = case.q.transpose(0, 1)[None].contiguous()
    wide_k, wide_v = (x.repeat_interleave(GROUP, 1) for x in (k, v))
    return {
        "torch sdpa, dense KV": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        "torch sdpa, dense KV, repeated": lambda: F.scaled_dot_product_attention(q, wide_k, wide_v, is_causal=True),
    }


def backward_peers(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, d_out_SBHD: torch.Tensor) -> dict[str, Work]:
    leaves = [x.permute(1, 2, 0, 3).contiguous().requires_grad_() for x in (q, k, v)]
    d_out = d_out_SBHD.permute(1, 2, 0, 3).contiguous()
    outs: list[torch.Tensor] = []

    def differentiate() -> tuple[torch.Tensor, ...]:
        if not outs:
            outs.append(F.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True))
        return torch.autograd.grad(outs[0], leaves, d_out, retain_graph=True)

    return {"torch sdpa": differentiate}
