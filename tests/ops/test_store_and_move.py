"""store_kv, apply_rope and rBlock moves; and every op's fake kernel against its real one."""

import pytest
import torch

from megatron_distkv.errors import ConfigError
from megatron_distkv.ops import (
    apply_rope,
    available_backends,
    gather_rblocks,
    scatter_rblocks,
    store_kv,
    use_backend,
)


def int64(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def test_store_writes_only_its_slots() -> None:
    pool = torch.zeros(3, 2, 2, 2, 4, 8)
    k, v = torch.randn(2, 2, 2, 8).unbind()
    store_kv(k, v, pool, 1, int64(2 * 4 + 3, 0))
    assert torch.equal(pool[2, 1, :, 0, 3], k[0])
    assert torch.equal(pool[0, 1, :, 1, 0], v[1])
    assert pool.count_nonzero() == k.numel() + v.numel()


def test_rope_turns_pairs_by_their_angles_and_leaves_the_rest() -> None:
    # Given 6 of 8 dims rotated: pairs (0, 3), (1, 4), (2, 5)
    torch.manual_seed(0)
    x = torch.randn(5, 2, 8)
    angles = torch.rand(5, 3) * 6
    cos, sin = (f(angles).repeat(1, 2) for f in (torch.cos, torch.sin))

    # When rotated
    turned = apply_rope(x, cos, sin)

    # Then each pair is one complex number times exp(i angle), dims 6 and 7 are untouched
    as_complex = torch.complex(x[..., :3].double(), x[..., 3:6].double()) * torch.polar(
        torch.ones(5, 1, 3, dtype=torch.float64), angles[:, None].double()
    )
    assert torch.allclose(turned[..., :3].double(), as_complex.real, atol=1e-6)
    assert torch.allclose(turned[..., 3:6].double(), as_complex.imag, atol=1e-6)
    assert torch.equal(turned[..., 6:], x[..., 6:])


def test_rblocks_travel_bit_by_bit() -> None:
    source, target = torch.randn(6, 2, 1, 2, 4, 8), torch.zeros(5, 2, 1, 2, 4, 8)
    scatter_rblocks(gather_rblocks(source, int64(4, 0, 3)), target, int64(1, 4, 2))
    assert torch.equal(target[[1, 4, 2]], source[[4, 0, 3]])
    assert target[[0, 3]].count_nonzero() == 0


def test_ops_declare_their_shapes_and_mutations_truly() -> None:
    pool, q, kv = torch.randn(4, 2, 2, 2, 4, 8), torch.randn(3, 4, 8), torch.randn(3, 2, 8)
    attention = (q, pool, 1, int64(0, 2), int64(0, 4), int64(0, 2), int64(0, 3), int64(4, 5, 6), 0.5, True, 3, 20.0)
    checks = [
        (torch.ops.distkv.micro_attention.default, attention),
        (torch.ops.distkv.micro_attention_out.default, (*attention, torch.empty(3, 4, 8), torch.empty(3, 4))),
        (torch.ops.distkv.merge.default, (torch.randn(2, 3, 4, 8), torch.randn(2, 3, 4))),
        (torch.ops.distkv.store_kv.default, (kv, kv.clone(), pool, 0, int64(1, 2, 3))),
        (
            torch.ops.distkv.store_kv.default,
            (kv, kv.clone(), pool, 0, int64(1, 2, 3), torch.randn(3, 4), torch.randn(3, 4)),
        ),
        (torch.ops.distkv.apply_rope.default, (q, torch.randn(3, 4), torch.randn(3, 4))),
        (gather_rblocks, (pool, int64(1, 0))),
        (scatter_rblocks, (torch.randn(1, 2, 2, 2, 4, 8), pool, int64(2))),
    ]
    for op, args in checks:
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


def test_an_unknown_backend_is_one_sentence() -> None:
    assert "reference" in available_backends()
    with pytest.raises(ConfigError, match="no kernel backend 'warp'"):
        use_backend("warp")
