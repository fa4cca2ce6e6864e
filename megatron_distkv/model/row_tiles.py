"""Matrix products whose bits do not depend on how many tokens are computed together.

The libraries choose another order of sums for other numbers of rows (docs/experiments.md). So each linear layer is
called with exactly TILE_ROWS rows at a time, the last ones filled up with zeros. Megatron's layers stay as they are.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from megatron_distkv.errors import ConfigError

# Fewer cost a prompt more (fp32 with 8: twice the time), more a single decode, which then computes rows for nothing.
TILE_ROWS = 16


@torch.inference_mode()
def tile_rows(model: torch.nn.Module) -> None:
    """Tile all linear layers, for serving. A collective of the model's ranks.

    Raises ConfigError where, on this machine, a row's place in its tile changes its bits.
    """
    for name, module in model.named_modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear):
            module.forward = partial(_in_tiles, module.forward)
            if module.weight is not None and not _is_indifferent_to_places(module):
                raise ConfigError(
                    f"deterministic cannot be had here: {name} in {module.weight.dtype} depends on a row's place"
                )


def _in_tiles(forward: Callable[..., Any], x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    num_rows = x.shape[0]
    padding = -num_rows % TILE_ROWS
    if padding:
        x = torch.cat((x, x.new_zeros((padding, *x.shape[1:]))))
    results = [forward(tile, *args, **kwargs) for tile in x.split(TILE_ROWS)]
    whole = torch.cat([out for out, _ in results])[:num_rows] if results else forward(x, *args, **kwargs)[0]
    return whole, (results[0][1] if results else None)


def _is_indifferent_to_places(module: Any) -> bool:
    width = module.weight.shape[1]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((TILE_ROWS, 1, width), generator=generator).to(module.weight.dtype)
    out = module(x)[0]
    return all(torch.equal(module(x.roll(by, 0))[0].roll(-by, 0), out) for by in (1, 3, 8))
