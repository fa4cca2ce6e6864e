"""One rank's place in a context group."""

from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_distkv.context_parallel.zigzag_layout import ZigzagLayout


class ContextShard(NamedTuple):
    """Rank `cp_rank` of `cp_group` (None: a rank alone) holds the tokens that `layout` gives it."""

    layout: ZigzagLayout
    cp_rank: int = 0
    cp_group: dist.ProcessGroup | None = None

    @property
    def tokens(self) -> torch.Tensor:
        """Each row's place in the whole sequence, int64."""
        return self.layout.tokens(self.cp_rank)

    def check_num_rows(self, num_rows: int) -> None:
        """Raises ValueError unless the shard has that many tokens."""
        held = sum(segment.stop - segment.start for segment in self.layout.segments(self.cp_rank))
        if num_rows != held:
            raise ValueError(f"rank {self.cp_rank} holds {held} tokens of {self.layout}, got {num_rows}")
