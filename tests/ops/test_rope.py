"""RoPE on the way into an rBlock: the same as apply_rope and store_kv, by the angles that transformers has."""

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_distkv.attention.rotary import RotaryConfig, rotary_table
from megatron_distkv.config.model import RopeScaling
from megatron_distkv.ops import apply_rope, store_kv

LAYERS, LAYER, KV_HEADS, SIZE, BLOCKS = 2, 1, 3, 8, 4
BASE = 500.0
# Placed so that within one head some dims are stretched fully, some on the ramp, some not at all
SCALINGS = {
    "default": None,
    "llama3": RopeScaling(kind="llama3", factor=8.0, original_context_tokens=128),
    "yarn": RopeScaling(
        kind="yarn", factor=4.0, original_context_tokens=512, attention_factor=0.1 * math.log(4.0) + 1.0
    ),
}


class Tokens:
    """Some new tokens, K and V neighbours in one projection's output as they are in a model, and where they go."""

    def __init__(self, dtype: torch.dtype, head_dim: int, pool_dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.k, self.v = torch.randn(11, 2, KV_HEADS, head_dim).to(dtype).unbind(1)
        self.slots = torch.randperm(BLOCKS * SIZE)[:11]
        self.pool = torch.zeros(BLOCKS, LAYERS, KV_HEADS, 2, SIZE, head_dim, dtype=pool_dtype)

    def stored(self) -> torch.Tensor:
        return self.pool[self.slots // SIZE, LAYER, :, :, self.slots % SIZE]


@pytest.mark.parametrize(
    ("head_dim", "rotated", "dtype", "pool_dtype"),
    [
        (128, 128, torch.bfloat16, torch.bfloat16),
        (80, 40, torch.bfloat16, torch.bfloat16),
        (24, 24, torch.float32, torch.float32),
        (16, 6, torch.float16, torch.float16),
        (96, 72, torch.bfloat16, torch.float32),
    ],
)
def test_turned_on_the_way_is_turned_then_stored(
    head_dim: int, rotated: int, dtype: torch.dtype, pool_dtype: torch.dtype
) -> None:
    tokens = Tokens(dtype, head_dim, pool_dtype)
    angles = torch.rand(11, rotated // 2) * 6
    cos, sin = (f(angles).repeat(1, 2) for f in (torch.cos, torch.sin))
    store_kv(tokens.k, tokens.v, tokens.pool, LAYER, tokens.slots, cos, sin)
    # Then bit for bit as one after the other, rounded to the pool's dtype and to no other on the way
    source = tokens.k if dtype == pool_dtype else tokens.k.to(pool_dtype)
    assert torch.equal(tokens.stored()[:, :, 0], apply_rope(source, cos, sin))
    assert torch.equal(tokens.stored()[:, :, 1], tokens.v.to(pool_dtype))
    assert tokens.pool[:, 1 - LAYER].count_nonzero() == 0


@pytest.mark.parametrize("kind", SCALINGS)
def test_keys_lie_as_transformers_would_turn_them(kind: str) -> None:
    # Given transformers' own frequencies and factor
    scaling, head_dim = SCALINGS[kind], 64
    frequencies, factor = BASE ** -(torch.arange(0, head_dim, 2) / head_dim), 1.0
    if scaling is not None:
        rope = {"rope_type": kind, "rope_theta": BASE, "factor": scaling.factor}
        rope |= {"original_max_position_embeddings": scaling.original_context_tokens}
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
        config = LlamaConfig(head_dim=head_dim, max_position_embeddings=2048, rope_parameters=rope)
        frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
        assert (factor != 1.0) == (kind == "yarn")
    # When tokens of far-apart positions are stored by our table
    tokens = Tokens(torch.float32, head_dim, torch.float32)
    positions = torch.randint(0, 2048, (11,))
    table = rotary_table(positions, RotaryConfig(1.0, BASE, scaling), head_dim)
    store_kv(tokens.k, tokens.v, tokens.pool, LAYER, tokens.slots, *table)
    # Then each pair of dims (i, i + D / 2) is a complex number, turned and made longer by the factor
    angles = torch.outer(positions.double().cpu(), frequencies.double().cpu())
    turns = torch.polar(torch.full_like(angles, factor), angles).to(tokens.k.device)
    pairs = torch.complex(*tokens.k.double().chunk(2, dim=-1)) * turns[:, None]
    expected = torch.cat((pairs.real, pairs.imag), dim=-1).float()
    # (its frequencies are fp32: at position 2,000 an angle is known to 1e-4)
    torch.testing.assert_close(tokens.stored()[:, :, 0], expected, rtol=0, atol=1e-3)


def test_angles_that_do_not_fit_are_refused() -> None:
    tokens = Tokens(torch.float32, 16, torch.float32)
    cos, sin = torch.ones(2, 11, 16).unbind()
    for wrong in (
        (cos[:5], sin[:5]),
        (cos[:, :5], sin[:, :5]),
        (cos, sin[:, :8]),
        (cos.repeat(1, 2), sin.repeat(1, 2)),
    ):
        with pytest.raises(ValueError, match="a row per token"):
            store_kv(tokens.k, tokens.v, tokens.pool, LAYER, tokens.slots, *wrong)
        with pytest.raises(ValueError, match="a row per token"):
            apply_rope(tokens.k, *wrong)
    with pytest.raises(ValueError, match="fp32"):
        store_kv(tokens.k, tokens.v, tokens.pool, LAYER, tokens.slots, cos.double(), sin.double())
    with pytest.raises(ValueError, match="together"):
        store_kv(tokens.k, tokens.v, tokens.pool, LAYER, tokens.slots, cos)
    assert tokens.pool.count_nonzero() == 0
