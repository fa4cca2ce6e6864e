"""Configuration of a memory-only lender: what `distkv lend` starts."""

from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from megatron_distkv.config.base import FrozenConfig
from megatron_distkv.config.instance import LedgerConfig
from megatron_distkv.config.memory_size import MemorySize
from megatron_distkv.config.network import NetworkConfig


class LenderConfig(FrozenConfig):
    lender_id: str = Field("lender-0", pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    """Unique in the pool, among instances too."""
    run_dir: Path
    """Where the lender's sockets lie; a short path (a unix socket's path has at most 107 bytes)."""
    memory: MemorySize | None = None
    """Host memory to lend, as `64GiB` or bytes: as many rBlocks as fit."""
    num_rblocks: int | None = Field(None, ge=1)
    """The same as a number of rBlocks. One of the two is needed."""
    threads: int = Field(1, ge=1)
    """CPU threads for each debtor's MicroAttention."""
    ledger: LedgerConfig = LedgerConfig()
    network: NetworkConfig = NetworkConfig()

    @model_validator(mode="after")
    def _has_one_size(self) -> Any:
        if (self.memory is None) == (self.num_rblocks is None):
            raise ValueError("a lender needs either memory or num_rblocks")
        return self
