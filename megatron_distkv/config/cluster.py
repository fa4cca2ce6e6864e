"""Configuration of a whole pool on one host: what `distkv up` starts."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from megatron_distkv.config.admission import AdmissionConfig
from megatron_distkv.config.base import FrozenConfig
from megatron_distkv.config.instance import KVCacheConfig, LedgerConfig, LendingConfig, SchedulerConfig


class ClusterConfig(FrozenConfig):
    model: Path
    """Directory of the checkpoint that every instance serves."""
    served_model_name: str = "distkv"
    """The model's name in the OpenAI API."""
    instances: int = Field(3, ge=1, le=64)
    """Serving instances."""
    tensor_parallel: int = Field(1, ge=1)
    """Ranks of each instance."""
    lenders: int = Field(0, ge=0, le=64)
    """Memory-only lenders: processes that lend host memory to the instances."""
    lender_rblocks: int = Field(256, ge=1)
    """rBlocks that each lender lends."""
    threads: int = Field(1, ge=1)
    """CPU threads per rank."""
    dtype: Literal["fp32", "bf16"] | None = None
    """Overrides the checkpoint's dtype."""
    deterministic: bool = False
    """The same bits wherever a request's rBlocks lie and whatever else is in the batch, at the price of speed."""
    host: str = "127.0.0.1"
    """Address of the gateway."""
    port: int = Field(8000, ge=0, le=65535)
    """Port of the gateway; 0 takes a free one and prints it."""
    launcher: Literal["deepspeed", "python"] = "deepspeed"
    """How an instance is started: as a deepspeed job, or (one rank only, quicker) as a plain process."""
    plan_interval_s: float = Field(1.0, gt=0)
    """Time between two plans of the gManager."""
    start_timeout_s: float = Field(180.0, gt=0)
    """An instance that is not ready within this time ends the start."""
    log_dir: Path | None = None
    """Where the parts' logs stay. None: in a directory of their own, which is removed after a clean end and kept where
    a part has failed."""
    admission: AdmissionConfig = AdmissionConfig()
    """When the gateway holds back or refuses requests."""
    kv_cache: KVCacheConfig = KVCacheConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    lending: LendingConfig = LendingConfig()
    ledger: LedgerConfig = LedgerConfig(url="embedded://")
    """embedded:// starts a ledger server of its own that dies with the cluster."""
