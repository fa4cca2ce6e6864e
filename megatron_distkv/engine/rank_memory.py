"""The memory that a rank's KV lies in: its pool, own host memory, and, beside a pool in int8, open rBlocks."""

from dataclasses import dataclass

import msgspec

from megatron_distkv.attention import HostMemory, OpenRBlocks
from megatron_distkv.config.instance import InstanceConfig, KVCacheConfig
from megatron_distkv.config.model import ModelConfig
from megatron_distkv.errors import UserError
from megatron_distkv.kvcache.open_slots import OpenSlots
from megatron_distkv.kvcache.rblock_pool import RBlockPool, open_pool, rank_pool
from megatron_distkv.kvcache.rblock_shape import RBlockShape


@dataclass(frozen=True)
class RankMemory:
    """`scale`: the ordinary one of scores. `host` computes over `host_pool`; both None: there is no host memory."""

    shape: RBlockShape
    scale: float
    pool: RBlockPool
    host_pool: RBlockPool | None
    host: HostMemory | None
    open_rblocks: OpenRBlocks | None


def make_rank_memory(config: InstanceConfig, shape: RBlockShape) -> RankMemory:
    num_host, scale = config.kv_cache.num_host_rblocks, shape.head_dim**-0.5
    pool = rank_pool(shape, config.kv_cache.num_rblocks)
    host_pool = rank_pool(shape, num_host) if num_host else None
    host = HostMemory(host_pool.tensor_BLK2ND, scale, shape.head_dim) if host_pool else None
    return RankMemory(shape, scale, pool, host_pool, host, _open_rblocks(config, shape, pool))


def _open_rblocks(config: InstanceConfig, shape: RBlockShape, pool: RBlockPool) -> OpenRBlocks | None:
    num_slots = OpenSlots(num_own_open_slots(config)).num_slots
    return OpenRBlocks(pool.tensor_BLK2ND, open_pool(shape, num_slots).tensor_BLK2ND) if num_slots else None


def num_own_open_slots(config: InstanceConfig) -> int | None:
    """None: rBlocks that are not full lie where full ones do."""
    return config.scheduler.max_running_requests if config.kv_cache.dtype == "int8" else None


def rblock_shape(model: ModelConfig, cache: KVCacheConfig, tensor_parallel: int) -> RBlockShape:
    """Raises UserError for what rBlocks cannot be."""
    try:
        return RBlockShape(
            model.num_layers,
            model.num_attention_heads,
            model.num_kv_heads,
            model.head_dim,
            cache.rblock_size,
            model.dtype,
            tensor_parallel,
            cache.dtype,
        )
    except ValueError as error:
        raise UserError(str(error)) from error


def memory_in_words(shape: RBlockShape, config: InstanceConfig) -> str:
    """Of an instance: what all its ranks have together."""
    cache = config.kv_cache
    words = f"{cache.num_rblocks} rBlocks of {shape.rblock_size} tokens in {shape.kv_name}"
    words += f", {cache.num_rblocks * shape.rblock_bytes / 2**30:.3g} GiB"
    if num_own := num_own_open_slots(config):
        one = msgspec.structs.replace(shape, kv_dtype="auto").rblock_bytes
        words += f"; up to {num_own} that are not full beside them in {shape.dtype}, of {one / 2**20:.3g} MiB each"
    return words
