"""Matrix products whose bits do not depend on how many tokens are computed together.

The libraries choose another order of sums for some numbers of rows (docs/experiments.md). So a linear layer is called
with TILE_ROWS rows at a time, the last ones filled up with zeros, or with another number of rows for which, when the
instance starts, it is found to give the very same bits: more for a prompt, fewer for a few tokens. Routers of experts
are linear layers too, and so are the halves of each expert, which get that expert's tokens only: who else is routed
there changes no more than a larger batch does. Megatron's layers stay as they are.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.moe.router import Router

from megatron_distkv.errors import ConfigError

# The other numbers are compared with this one, which all layers have; 1 to 3 rows have an order of their own (fp32).
TILE_ROWS = 16
OTHER_ROWS = (8, 32, 64, 128, 256)
# Weights times rows of the largest trial call: about a second of one core. Only a vocabulary is larger.
MOST_PRODUCTS = 1 << 34

_Call = Callable[[torch.Tensor], torch.Tensor]


@torch.inference_mode()
def tile_rows(model: torch.nn.Module) -> None:
    """Tile all linear layers, for serving. A collective of the model's ranks.

    Raises ConfigError where, on this machine, a row's place in its tile changes its bits.
    """
    trials: dict[tuple[Any, ...], tuple[int, ...]] = {}  # layers that are alike are tried once
    for name, module in model.named_modules():
        if isinstance(module, Router):
            gating = module.gating
            module.gating = partial(_in_tiles, gating, _tried(name, module, gating, trials))
        elif isinstance(module, ColumnParallelLinear | RowParallelLinear):
            sizes: tuple[int, ...] = (TILE_ROWS,)  # of a layer that gets its weight with each call, the embeddings'
            if module.weight is not None:
                sizes = _tried(name, module, partial(_product, module.forward), trials)
            module.forward = partial(_linear_in_tiles, module.forward, sizes)


def _product(forward: Callable[..., Any], x: torch.Tensor) -> torch.Tensor:
    return forward(x)[0]


def _linear_in_tiles(
    forward: Callable[..., Any], sizes: tuple[int, ...], x: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, Any]:
    biases: list[Any] = []

    def call(tile: torch.Tensor) -> torch.Tensor:
        out, bias = forward(tile, *args, **kwargs)
        biases.append(bias)
        return out

    return _in_tiles(call, sizes, x), biases[0]


def _in_tiles(call: _Call, sizes: tuple[int, ...], x: torch.Tensor) -> torch.Tensor:
    num_rows = x.shape[0]
    if num_rows == 0 or num_rows in sizes:
        return call(x)
    tiles = rows_of_tiles(num_rows, sizes)
    if padding := sum(tiles) - num_rows:
        x = torch.cat((x, x.new_zeros((padding, *x.shape[1:]))))
    whole = call(x) if len(tiles) == 1 else torch.cat([call(tile) for tile in x.split(tiles)])
    return whole[:num_rows]


@lru_cache(maxsize=4096)
def rows_of_tiles(num_rows: int, sizes: tuple[int, ...]) -> list[int]:
    """Of `sizes`, ascending; the last one may reach further. A call is worth up to a quarter of rows for nothing."""
    tiles = []
    while num_rows > 0:
        enough = min((size for size in sizes if size >= num_rows), default=0)
        fits = max((size for size in sizes if size <= num_rows), default=0)
        tiles.append(enough if not fits or 0 < enough - num_rows <= enough // 4 else fits)
        num_rows -= tiles[-1]
    return tiles


def _tried(name: str, module: Any, call: _Call, trials: dict[tuple[Any, ...], tuple[int, ...]]) -> tuple[int, ...]:
    weight, has_bias = module.weight, getattr(module, "bias", None) is not None
    kind = (type(module), weight.shape, weight.dtype, has_bias)
    if kind not in trials:
        most = max(TILE_ROWS, MOST_PRODUCTS // weight.numel())
        generator = torch.Generator().manual_seed(0)
        x = torch.randn((OTHER_ROWS[-1], 1, weight.shape[1]), generator=generator).to(weight.dtype)
        trials[kind] = sizes_with_the_same_bits(call, x[:most])
        if TILE_ROWS not in trials[kind]:
            raise ConfigError(f"deterministic cannot be had here: {name} in {weight.dtype} depends on a row's place")
    return trials[kind]


def sizes_with_the_same_bits(call: _Call, x: torch.Tensor) -> tuple[int, ...]:
    """Numbers of rows, up to those of `x`, that agree with tiles of TILE_ROWS wherever a row stands, and wherever their
    memory begins (an expert's rows are a piece of all); ascending."""
    whole = len(x) // TILE_ROWS * TILE_ROWS
    reference = torch.cat([call(tile) for tile in x[:whole].split(TILE_ROWS)])

    def agrees(size: int) -> bool:
        places = [(by, begin) for by in (0, 1, 3, 8) for begin in {0, min(1, whole - size), whole - size}]
        return all(
            torch.equal(call(x[:whole].roll(by, 0)[begin : begin + size]), reference.roll(by, 0)[begin : begin + size])
            for by, begin in places
        )

    return tuple(size for size in sorted((TILE_ROWS, *OTHER_ROWS)) if size <= whole and agrees(size))
