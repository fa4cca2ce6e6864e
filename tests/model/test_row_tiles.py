"""Row tiles: which numbers of rows are used, and what is found out about them before."""

from collections.abc import Callable

import pytest
import torch

from megatron_distkv.model.row_tiles import OTHER_ROWS, TILE_ROWS, rows_of_tiles, sizes_with_the_same_bits

ALL = tuple(sorted((TILE_ROWS, *OTHER_ROWS)))


@pytest.mark.parametrize("sizes", [(TILE_ROWS,), (8, 16), (16, 64), ALL])
def test_tiles_hold_all_rows_and_few_for_nothing(sizes: tuple[int, ...]) -> None:
    for num_rows in (*range(1, 300), 1000):
        tiles = rows_of_tiles(num_rows, sizes)
        assert set(tiles) <= set(sizes)
        assert num_rows <= sum(tiles) < num_rows + max(sizes[0], num_rows / 3 + 1)
    assert rows_of_tiles(512, ALL) == [256, 256]
    assert rows_of_tiles(1, ALL) == [8]


def product(rule: Callable[[int], int]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Row by row, but for row `rule(number of rows)`, which is computed in another way."""

    def call(x: torch.Tensor) -> torch.Tensor:
        out = 3 * x
        row = rule(len(x))
        if row < len(x):
            out[row, ..., -1] *= 1 + 2**-20
        return out

    return call


NEVER = 10**9


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (lambda _: NEVER, ALL),
        (lambda n: 0 if n == 64 else NEVER, tuple(size for size in ALL if size != 64)),  # another order for 64 rows
        (lambda n: 255 if n == 256 else NEVER, tuple(size for size in ALL if size != 256)),  # for the last of 256
        (lambda n: 5 if n == TILE_ROWS else NEVER, ()),  # a tile in which the place matters: nothing agrees with it
    ],
)
def test_a_number_of_rows_with_other_bits_is_not_used(rule: Callable[[int], int], expected: tuple[int, ...]) -> None:
    x = torch.randn(256, 1, 12, generator=torch.Generator().manual_seed(0))
    assert sizes_with_the_same_bits(product(rule), x) == expected
