"""Configuration of one serving instance, one class per room that reads it."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from megatron_distkv.config.base import FrozenConfig
from megatron_distkv.config.network import NetworkConfig

# The ledger of one instance without others, inside of its process.
LONELY_LEDGER = "memory://"
Layers = Literal["direct", "megatron"]


class KVCacheConfig(FrozenConfig):
    num_rblocks: int = Field(256, ge=2)
    """rBlocks in this instance's pool (per TP rank: each rank keeps its own heads of every rBlock)."""
    num_host_rblocks: int = Field(0, ge=0)
    """rBlocks in this instance's own host memory, beside the pool: used when that runs short, before any borrowing
    (after it where creditors answer much sooner), never lent. Attention over them is computed by the CPU."""
    num_lent_host_rblocks: int = Field(0, ge=0)
    """rBlocks of host memory that this instance lends: a memory-only lender in its process, named ID.host. The instance
    may borrow from it like everybody."""
    rblock_size: int = Field(64, ge=1)
    """Tokens per rBlock. 64 is the smallest size at which reads run near the memory's speed: docs/experiments.md."""
    dtype: Literal["auto", "int8"] = "auto"
    """Of K and V, here and at creditors; all members of a pool have the same. auto: the model's. int8: about half the
    memory of bf16, at an error of about 1e-2 of attention's output. rBlocks that are not full yet lie beside the pool
    in the model's dtype, one for each running request."""


class SchedulerConfig(FrozenConfig):
    max_batched_tokens: int = Field(512, ge=1)
    """Tokens computed in one step, prefill chunks and decodes together."""
    max_running_requests: int = Field(64, ge=1)
    """Requests that hold KV at one time."""
    max_waiting_requests: int = Field(256, ge=0)
    """Requests queued behind them; one more is refused with 429."""


class LendingConfig(FrozenConfig):
    enabled: bool = True
    """False: never borrow, never lend."""
    lendable_fraction: float = Field(0.9, ge=0.0, le=1.0)
    """Lending cap: the largest share of the pool that may be lent at one time; the rest protects local work."""
    low_watermark: float = Field(0.25, ge=0.0, le=1.0)
    """Borrowing starts when less than this share of the pool is free: ahead of need."""
    max_moved_rblocks_per_step: int = Field(16, ge=1)
    """rBlocks that migrate to creditors in one step at most, so that decoding does not feel it."""
    recall_patience_s: float = Field(1.0, ge=0.0)
    """rBlocks that a creditor recalls are fetched back; where they find no room for this long, they are recomputed."""
    deadline_s: float = Field(10.0, gt=0)
    """A creditor that does not answer within this time is lost; what lay there is recomputed."""
    min_deadline_s: float = Field(2.0, gt=0)
    """A creditor that usually answers much more quickly is asked on a new connection whether it is alive, after this
    time at the soonest, and is lost if it does not answer within the same time. With `deadline_s` or more it is not
    asked."""
    max_step_share: float = Field(0.5, gt=0.0, le=1.0)
    """While this instance computes its own requests, queries of debtors may take this share of its time; those beyond
    it are throttled, and their debtors are told. 1: no bound."""

    verify_one_in: int = Field(0, ge=0)
    """One in so many partial results of creditors is computed again here, from a copy of the borrowed rBlocks, and
    compared, with `deterministic` bit by bit; what comes back is compared with what was sent. A mismatch is an alarm.
    0: only NaN and infinity are."""

    def max_lent(self, num_rblocks: int) -> int:
        """rBlocks of a pool of so many that may be lent at one time."""
        return int(num_rblocks * self.lendable_fraction) if self.enabled else 0


class LedgerConfig(FrozenConfig):
    url: str = LONELY_LEDGER
    """redis://, rediss:// (TLS) or unix:// with password and database in the URL; memory:// for one instance alone."""
    pool: str = Field("default", pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    """Instances of one pool lend to each other."""
    secret_file: Path | None = None
    """Holds the pool's secret, which members prove to each other that they know; mode 0600. Without a file
    $DISTKV_SECRET is the secret, and without that everybody who reaches an instance's sockets is a member."""
    lease_s: float = Field(10.0, gt=0)
    """An instance silent for this long is dead: its debts are void, its credits return."""
    heartbeat_interval_s: float = Field(0.5, gt=0)
    """Time between two reports to the ledger."""


class InstanceConfig(FrozenConfig):
    instance_id: str = Field("instance-0", pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    """Unique in the pool; a restart under the same id replaces its predecessor."""
    model: Path
    """Directory of the checkpoint: Hugging Face safetensors or Megatron torch_dist."""
    run_dir: Path
    """Where the instance's sockets lie; a short path (a unix socket's path has at most 107 bytes)."""
    dtype: Literal["fp32", "bf16"] | None = None
    """Overrides the checkpoint's dtype."""
    tensor_parallel: int = Field(1, ge=1)
    """Ranks of this instance."""
    threads: int = Field(1, ge=1)
    """CPU threads per rank."""
    layers: Layers = "direct"
    """How the decoder's layers are computed. direct: Megatron's modules and weights, walked without its forward methods
    (autograd, hooks and module calls are a third of a decode step). megatron: by Megatron's own forward, as training
    does; always with `deterministic`. The bits are the same in fp32; in bf16 products differ in the last one."""
    deterministic: bool = False
    """The same bits for the same request, wherever its rBlocks lie and whatever else is in the batch, at the price of
    speed: docs/determinism.md. All instances of a pool must say the same and have the same processor."""
    kv_cache: KVCacheConfig = KVCacheConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    lending: LendingConfig = LendingConfig()
    ledger: LedgerConfig = LedgerConfig()
    network: NetworkConfig = NetworkConfig()

    @model_validator(mode="after")
    def _lent_host_memory_goes_with(self) -> "InstanceConfig":
        if self.kv_cache.num_lent_host_rblocks and not self.lending.enabled:
            raise ValueError("kv_cache.num_lent_host_rblocks needs lending.enabled")
        if self.kv_cache.num_lent_host_rblocks and self.ledger.url == LONELY_LEDGER:
            raise ValueError("kv_cache.num_lent_host_rblocks needs a ledger that others see: set ledger.url")
        return self
