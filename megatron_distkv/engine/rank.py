"""What every tensor-parallel rank of an instance has: its part of the model, its pool, its channels."""

from dataclasses import dataclass

import msgspec
import torch

from megatron_distkv.attention import (
    Creditor,
    Deadlines,
    Debtor,
    FixedAttention,
    HostMemory,
    LoanTable,
    OpenRBlocks,
    StepShare,
    Verification,
)
from megatron_distkv.config.instance import InstanceConfig, KVCacheConfig
from megatron_distkv.config.model import ModelConfig
from megatron_distkv.engine.doors import tls_of
from megatron_distkv.engine.model_runner import ModelRunner
from megatron_distkv.errors import UserError
from megatron_distkv.kvcache.open_slots import OpenSlots
from megatron_distkv.kvcache.rblock_shape import RBlockShape
from megatron_distkv.ledger import HOST_QUERY_US, QUERY_US
from megatron_distkv.log import get_logger
from megatron_distkv.model import GPT, TensorParallel, build_gpt, find_checkpoint, load_weights, tile_rows
from megatron_distkv.rblock import InstanceId
from megatron_distkv.rmanager import Identity, MailboxSizes, Migration, Peers
from megatron_distkv.transport import TensorSpec, read_secret

logger = get_logger(__name__)
# Migrated rBlocks travel in messages of about this size: large enough for full bandwidth, small enough for a mailbox.
STORE_MESSAGE_BYTES = 8 << 20
# Room for a message's header: the physical ids of a hundred thousand rBlocks.
HEADER_BYTES = 512 << 10
# In fixed order a token has several partials: fewer messages than by the tokens of a step alone.
LEAST_FIXED_ANSWERS = 512


@dataclass
class Rank:
    config: InstanceConfig
    model: ModelConfig
    parallel: TensorParallel
    shape: RBlockShape
    costs: dict[str, str]
    """Of a query in each tier, measured: for the registration's info."""
    identity: Identity
    peers: Peers
    loan_table: LoanTable
    creditor: Creditor
    runner: ModelRunner
    secret: bytes


def build_rank(config: InstanceConfig, parallel: TensorParallel) -> Rank:
    """Load the checkpoint and make this rank's pool; raises UserError (one sentence) when it cannot serve."""
    checkpoint = find_checkpoint(config.model)
    model = checkpoint.model if config.dtype is None else checkpoint.model.model_copy(update={"dtype": config.dtype})
    module = build_gpt(model, parallel)
    load_weights(module, checkpoint, model)
    if config.deterministic:
        tile_rows(module)
    shape = rblock_shape(model, config.kv_cache, parallel.size)
    pool, dtype, num_query_heads = (
        shape.rank_pool(config.kv_cache.num_rblocks),
        shape.torch_dtype,
        shape.query_heads_per_rank,
    )
    if parallel.is_leader:
        logger.info("KV cache: %s", _in_words(shape, config))
    per_message = min(config.lending.max_moved_rblocks_per_step, max(1, STORE_MESSAGE_BYTES // pool.rblock_bytes))
    sizes = _mailbox_sizes(_mailbox_tokens(config), num_query_heads, model.head_dim, dtype)
    moved_bytes = HEADER_BYTES + per_message * pool.rblock_bytes
    sizes = MailboxSizes(max(sizes.request_bytes, moved_bytes), max(sizes.reply_bytes, moved_bytes))
    identity = Identity(InstanceId(config.instance_id))
    deadline_s = config.lending.deadline_s
    secret = read_secret(config.ledger.secret_file)
    tls = tls_of(config.network)
    peers = Peers(config.ledger.pool, identity, parallel.rank, sizes, deadline_s, secret, tls, shape)
    loan_table = LoanTable()
    tensor, scale = pool.tensor_BLK2ND, model.head_dim**-0.5
    num_host = config.kv_cache.num_host_rblocks
    host_pool = shape.rank_pool(num_host) if num_host else None
    host = HostMemory(host_pool.tensor_BLK2ND, scale, model.head_dim) if host_pool else None
    rblock = TensorSpec(tuple(tensor.shape[1:]), tensor.dtype)
    verification = Verification(config.lending.verify_one_in, rblock, scale, per_message, deadline_s, model.head_dim)
    deadlines = Deadlines(config.lending.min_deadline_s, deadline_s, peers.is_alive)
    share = StepShare(config.lending.max_step_share)
    debtor = Debtor(peers, deadline_s, host, verification, deadlines)
    most_answers = _mailbox_tokens(config)
    runner = ModelRunner(
        GPT(module, model),
        pool,
        peers,
        Migration(tensor, peers, per_message, deadline_s, host, verification),
        debtor,
        verification,
        share,
        FixedAttention(debtor, pool.rblock_size, most_answers) if config.deterministic else None,
        _open_rblocks(config, shape, tensor),
    )
    creditor = Creditor(
        tensor,
        loan_table,
        num_query_heads,
        dtype,
        scale,
        share,
        rank=parallel.rank,
        num_ranks=parallel.size,
        head_dim=model.head_dim,
    )
    costs = {QUERY_US: f"{creditor.warm_up():.1f}"}
    if host is not None:
        costs[HOST_QUERY_US] = f"{host.warm_up(num_query_heads, dtype):.1f}"
    logger.info("pool of %s", pool.describe())
    if host_pool is not None:
        logger.info("host memory of %s", host_pool.describe())
    return Rank(config, model, parallel, shape, costs, identity, peers, loan_table, creditor, runner, secret)


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


def _in_words(shape: RBlockShape, config: InstanceConfig) -> str:
    cache = config.kv_cache
    words = f"{cache.num_rblocks} rBlocks of {shape.rblock_size} tokens in {shape.kv_name}"
    words += f", {cache.num_rblocks * shape.rblock_bytes / 2**30:.3g} GiB"
    if num_own := num_own_open_slots(config):
        one = msgspec.structs.replace(shape, kv_dtype="auto").rblock_bytes
        words += f"; up to {num_own} that are not full beside them in {shape.dtype}, of {one / 2**20:.3g} MiB each"
    return words


def num_own_open_slots(config: InstanceConfig) -> int | None:
    """None: rBlocks that are not full lie where full ones do."""
    return config.scheduler.max_running_requests if config.kv_cache.dtype == "int8" else None


def _open_rblocks(config: InstanceConfig, shape: RBlockShape, pool_BLKX: torch.Tensor) -> OpenRBlocks | None:
    num_slots = OpenSlots(num_own_open_slots(config)).num_slots
    return OpenRBlocks(pool_BLKX, shape.open_pool(num_slots).tensor_BLK2ND) if num_slots else None


def _mailbox_tokens(config: InstanceConfig) -> int:
    """Tokens of one question, or, in fixed order, partials of one answer."""
    return max(config.scheduler.max_batched_tokens, LEAST_FIXED_ANSWERS if config.deterministic else 0)


def _mailbox_sizes(max_tokens: int, num_heads: int, head_dim: int, dtype: torch.dtype) -> MailboxSizes:
    rows = max_tokens * num_heads
    return MailboxSizes(HEADER_BYTES + rows * head_dim * dtype.itemsize, 4096 + rows * (head_dim + 1) * 4)
