"""Linear layers of serving against float64: rounded once, and no row knows of another."""

import pytest
import torch
import torch.nn.functional as F

from megatron_distkv.ops import linear

# (rows, outputs, inputs): single ones, ends of tiles, of cache lines and of what is summed at a time
SHAPES = [
    (1, 1, 1), (1, 3, 8), (2, 97, 130), (3, 48, 64), (4, 6, 1024), (5, 49, 1025), (8, 100, 1056), (9, 7, 2600),
    (33, 50, 96), (64, 48, 32), (65, 96, 33), (130, 10, 4096),
]  # fmt: skip
HALF_OF_LAST_BIT = 2.0**-8  # of bf16, relative
FP32_SUM = 2.0**-20  # of all products' magnitudes: far above what summing in fp32 costs, far below a bf16 sum's


def random(rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, device="cpu").to(torch.get_default_device()).bfloat16()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_are_exact_and_rounded_once(shape: tuple[int, int, int]) -> None:
    num_rows, num_outputs, num_inputs = shape
    x_MK, w_NK = random(num_rows, num_inputs, 1), random(num_outputs, num_inputs, 2)
    y_MN = linear(x_MK, w_NK)
    exact_MN = x_MK.double() @ w_NK.double().T
    allowed_MN = HALF_OF_LAST_BIT * exact_MN.abs() + FP32_SUM * (x_MK.double().abs() @ w_NK.double().abs().T)
    assert y_MN.dtype is torch.bfloat16
    assert bool(((y_MN.double() - exact_MN).abs() <= 1.01 * allowed_MN).all())


@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_rows_bits_are_its_own(backend: str, num_threads: int) -> None:
    if not backend.startswith("cpu"):
        pytest.skip("torch promises nothing of the kind")
    x_MK, w_NK = random(32, 2600, 3), random(101, 2600, 4)
    whole_MN = linear(x_MK, w_NK)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        for begin, end in ((0, 1), (1, 3), (3, 6), (6, 13), (13, 30), (30, 32)):
            assert torch.equal(linear(x_MK[begin:end], w_NK), whole_MN[begin:end])
    finally:
        torch.set_num_threads(before)


def test_rows_may_lie_apart_and_columns_too() -> None:
    x, w = random(5, 200, 5), random(30, 200, 6)
    expected = linear(x[:, :70].contiguous(), w[::3, 100:170].contiguous())
    assert torch.equal(linear(x[:, :70], w[::3, 100:170]), expected)
    assert torch.equal(linear(x[:, :70].T.contiguous().T, w[::3, 100:170]), expected)


def test_no_rows_give_none() -> None:
    assert linear(random(0, 16, 7), random(8, 16, 8)).shape == (0, 8)


def test_infinite_and_missing_numbers_stay_in_their_rows() -> None:
    x_MK, w_NK = random(6, 100, 9), random(20, 100, 10)
    clean_MN = linear(x_MK, w_NK)
    x_MK[2, 7], x_MK[4, 99] = float("nan"), float("inf")
    y_MN = linear(x_MK, w_NK)
    assert bool(y_MN[2].isnan().all())
    assert bool(y_MN[4].isinf().all())
    assert torch.equal(y_MN[[0, 1, 3, 5]], clean_MN[[0, 1, 3, 5]])


def test_fp32_is_torchs() -> None:
    x_MK, w_NK = random(7, 300, 11).float(), random(40, 300, 12).float()
    assert torch.equal(linear(x_MK, w_NK), F.linear(x_MK, w_NK))


def test_what_does_not_fit_is_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"linear: x \(2, 8\) does not fit weights \(4, 9\)"):
        linear(random(2, 8, 13), random(4, 9, 14))
