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
from megatron_distkv.model.megatron_gpt import MegatronGPT

# The other numbers are compared with this one, which all layers have; 1 to 3 rows have an order of their own (fp32).
TILE_ROWS = 16
OTHER_ROWS = (8, 32, 64, 128, 256)
# Weights times rows of the largest trial call: all trials of a layer cost ten such calls, a few seconds of one core.
MOST_PRODUCTS = 1 << 33

_Call = Callable[[torch.Tensor], torch.Tensor]


@torch.inference_mode()
def tile_rows(model: MegatronGPT) -> None:
    """Tile all linear layers, for serving. A collective of the model's ranks.

    Raises ConfigError where, on this machine, a row's place in its tile changes its bits.
    """
    trials = _Trials()
    for name, module in model.named_modules():
        if isinstance(module, Router):
            gating = module.gating
            module.gating = partial(_in_tiles, gating, trials.sizes(name, module, module.weight, gating))
        elif isinstance(module, ColumnParallelLinear | RowParallelLinear):
            # Tied embeddings: the output layer has no weight of its own and gets theirs with each call.
            given = {} if module.weight is not None else {"weight": model.shared_embedding_or_output_weight()}
            product = partial(_product, module.forward, **given)
            sizes = trials.sizes(name, module, given.get("weight", module.weight), product)
            module.forward = partial(_linear_in_tiles, module.forward, sizes)


def _product(forward: Callable[..., Any], x: torch.Tensor, **given: torch.Tensor) -> torch.Tensor:
    return forward(x, **given)[0]


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


class _Trials:
    """Layers that are alike are tried once."""

    def __init__(self) -> None:
        self._sizes: dict[tuple[Any, ...], tuple[int, ...]] = {}

    def sizes(self, name: str, module: Any, weight: torch.Tensor, call: _Call) -> tuple[int, ...]:
        kind = (type(module), weight.shape, weight.dtype, getattr(module, "bias", None) is not None)
        if kind not in self._sizes:
            most = max(TILE_ROWS, MOST_PRODUCTS // weight.numel())
            generator = torch.Generator().manual_seed(0)
            x = torch.randn((OTHER_ROWS[-1], 1, weight.shape[1]), generator=generator).to(weight.dtype)
            self._sizes[kind] = sizes_with_the_same_bits(call, x[:most])
            if TILE_ROWS not in self._sizes[kind]:
                raise ConfigError(
                    f"deterministic cannot be had here: {name} in {weight.dtype} depends on a row's place"
                )
        return self._sizes[kind]


def sizes_with_the_same_bits(call: _Call, x: torch.Tensor) -> tuple[int, ...]:
    """Numbers of rows, up to those of `x`, that agree with tiles of TILE_ROWS wherever a row stands, and wherever their
    memory begins (an expert's rows are a piece of all); ascending."""
    whole = len(x) // TILE_ROWS * TILE_ROWS
    reference = torch.cat([call(tile) for tile in x[:whole].split(TILE_ROWS)])

    def agrees(size: int) -> bool:
        last = whole - size
        return all(
            torch.equal(call(x[:whole].roll(by, 0)[begin : begin + size]), reference.roll(by, 0)[begin : begin + size])
            for by, begin in ((0, last), (1, 0), (3, min(1, last)), (8, 0))
        )

    return tuple(size for size in sorted((TILE_ROWS, *OTHER_ROWS)) if size <= whole and agrees(size))
