"""Rotary position embedding, and writing new tokens' K and V into rBlocks."""

import torch

from megatron_distkv.ops.backend import kernels


def store_kv(
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    pool_BLK2ND: torch.Tensor,
    layer: int,
    slot_mapping_T: torch.Tensor,
    cos_TR: torch.Tensor | None = None,
    sin_TR: torch.Tensor | None = None,
) -> None:
    """Token t goes to slot `slot_mapping_T[t]` = physical rBlock id * N + offset, cast to the pool's dtype.

    With `cos_TR` and `sin_TR` K is turned on its way, as by `apply_rope`, and rounded once: to the pool's dtype.
    """
    if torch.compiler.is_compiling():
        torch.ops.distkv.store_kv(k_TKD, v_TKD, pool_BLK2ND, layer, slot_mapping_T, cos_TR, sin_TR)
        return
    args = (k_TKD, v_TKD, pool_BLK2ND, layer, slot_mapping_T)
    if cos_TR is None or sin_TR is None:
        if cos_TR is not sin_TR:
            raise ValueError("cos and sin come together")
        kernels(k_TKD, v_TKD, pool_BLK2ND).store_kv(*args)
        return
    _check_angles(k_TKD, cos_TR, sin_TR)
    kernels(k_TKD, v_TKD, pool_BLK2ND).store_kv(*args, (cos_TR, sin_TR))


torch.library.custom_op("distkv::store_kv", store_kv, mutates_args=("pool_BLK2ND",))


@torch.library.register_fake("distkv::store_kv")
def _(*_: object) -> None:
    return None


def apply_rope(x_THD: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor) -> torch.Tensor:
    """Rotate the first R of D dims of every head by each token's angles (rotate-half, as Hugging Face's Llama).

    `cos_TR` and `sin_TR` are fp32, their two halves equal; the other D - R dims pass (partial RoPE).
    """
    if torch.compiler.is_compiling():
        return torch.ops.distkv.apply_rope(x_THD, cos_TR, sin_TR)
    _check_angles(x_THD, cos_TR, sin_TR)
    turned: torch.Tensor = kernels(x_THD).apply_rope(x_THD, cos_TR, sin_TR)
    return turned


torch.library.custom_op("distkv::apply_rope", apply_rope, mutates_args=())


@torch.library.register_fake("distkv::apply_rope")
def _(x_THD: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty_like(x_THD)


def _check_angles(x_THD: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor) -> None:
    """Kernels read them as they are told to."""
    num_tokens, _, head_dim = x_THD.shape
    rotated = cos_TR.shape[-1]
    if not cos_TR.shape == sin_TR.shape == (num_tokens, rotated) or rotated % 2 or not 0 < rotated <= head_dim:
        raise ValueError("cos and sin must have a row per token, of an even number of dims up to the head's")
    if not all(x.dtype is torch.float32 and x.device == x_THD.device for x in (cos_TR, sin_TR)):
        raise ValueError("cos and sin must be fp32, where the tokens are")
