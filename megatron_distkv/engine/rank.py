"""What every tensor-parallel rank of an instance has: its part of the model, its pool, its channels."""

from dataclasses import dataclass
from typing import NamedTuple

from megatron_distkv.attention import (
    Creditor,
    Deadlines,
    Debtor,
    FixedAttention,
    LoanTable,
    QueryLimiter,
    Verification,
)
from megatron_distkv.clock import Clock, SystemClock
from megatron_distkv.config.instance import InstanceConfig
from megatron_distkv.config.model import ModelConfig
from megatron_distkv.engine.listeners import tls_of
from megatron_distkv.engine.mailbox_sizes import mailbox_sizes, most_answers, rblocks_per_message
from megatron_distkv.engine.model_runner import ModelRunner
from megatron_distkv.engine.rank_memory import RankMemory, make_rank_memory, memory_in_words, rblock_shape
from megatron_distkv.errors import ConfigError
from megatron_distkv.kvcache.rblock_pool import torch_dtype
from megatron_distkv.kvcache.rblock_shape import RBlockShape
from megatron_distkv.log import get_logger
from megatron_distkv.model import GPT, TensorParallel, build_gpt, find_checkpoint, fingerprint, load_weights, tile_rows
from megatron_distkv.ops import backend_in_use
from megatron_distkv.peers import Migration, Peers
from megatron_distkv.pool import Identity
from megatron_distkv.rblock import InstanceId
from megatron_distkv.transport import TensorSpec, read_secret

logger = get_logger(__name__)


class QueryCosts(NamedTuple):
    """What a query over one rBlock takes in each tier, measured: microseconds."""

    query_us: float
    host_query_us: float | None


@dataclass
class Rank:
    config: InstanceConfig
    model: ModelConfig
    parallel: TensorParallel
    shape: RBlockShape
    memory: RankMemory
    costs: QueryCosts
    fingerprint: str
    """Of the weights: ranks of other tensor parallelism, and other formats, have the same."""
    identity: Identity
    peers: Peers
    loan_table: LoanTable
    creditor: Creditor
    limiter: QueryLimiter
    runner: ModelRunner
    secret: bytes
    clock: Clock


def build_rank(config: InstanceConfig, parallel: TensorParallel, clock: Clock | None = None) -> Rank:
    """Load the checkpoint and make this rank's pool; raises UserError (one sentence) when it cannot serve."""
    clock = clock or SystemClock()
    model, gpt, weights = _load(config, parallel)
    shape = rblock_shape(model, config.kv_cache, parallel.size)
    memory = make_rank_memory(config, shape)
    if parallel.is_leader:
        logger.info("KV cache: %s", memory_in_words(shape, config))
    identity, secret = Identity(InstanceId(config.instance_id)), read_secret(config.ledger.secret_file)
    peers = _peers(config, parallel.rank, identity, secret, memory, clock)
    limiter, loan_table = QueryLimiter(config.lending.max_step_share, clock), LoanTable()
    runner = _runner(config, gpt, memory, peers, limiter, clock)
    creditor = _creditor(memory, loan_table, limiter, parallel, clock)
    costs = _warm_up(memory, creditor, clock)
    return Rank(
        config, model, parallel, shape, memory, costs, weights, identity, peers, loan_table, creditor, limiter, runner,
        secret, clock,
    )  # fmt: skip


def _load(config: InstanceConfig, parallel: TensorParallel) -> tuple[ModelConfig, GPT, str]:
    if config.deterministic and backend_in_use() != "cpu":
        raise ConfigError(
            f"deterministic needs the C++ kernels, and backend {backend_in_use()!r} serves here: "
            "other kernels' bits depend on the batch (`distkv doctor` says what is missing)"
        )
    checkpoint = find_checkpoint(config.model)
    model = checkpoint.model if config.dtype is None else checkpoint.model.model_copy(update={"dtype": config.dtype})
    module = build_gpt(model, parallel)
    load_weights(module, checkpoint, model)
    weights = fingerprint(module)
    if config.deterministic:
        tile_rows(module)  # of Megatron's layers
    return model, GPT(module, model, "megatron" if config.deterministic else config.layers), weights


def _peers(
    config: InstanceConfig, rank: int, identity: Identity, secret: bytes, memory: RankMemory, clock: Clock
) -> Peers:
    sizes, deadline_s = mailbox_sizes(config, memory), config.lending.deadline_s
    tls = tls_of(config.network)
    return Peers(config.ledger.pool, identity, clock, rank, sizes, deadline_s, secret, tls, memory.shape)


def _runner(
    config: InstanceConfig, gpt: GPT, memory: RankMemory, peers: Peers, limiter: QueryLimiter, clock: Clock
) -> ModelRunner:
    """All that this rank does in a step of its own."""
    limits, pool, host = config.lending, memory.pool, memory.host
    tensor, per_message, deadline_s = pool.tensor_BLK2ND, rblocks_per_message(config, memory), limits.deadline_s
    rblock, head_dim = TensorSpec(tuple(tensor.shape[1:]), tensor.dtype), memory.shape.head_dim
    verification = Verification(limits.verify_one_in, rblock, memory.scale, per_message, deadline_s, clock, head_dim)
    deadlines = Deadlines(limits.min_deadline_s, deadline_s, peers.is_alive)
    debtor = Debtor(peers, deadline_s, clock, host, verification, deadlines)
    migration = Migration(tensor, peers, per_message, deadline_s, host, verification)
    fixed = FixedAttention(debtor, pool.rblock_size, most_answers(config)) if config.deterministic else None
    return ModelRunner(gpt, pool, peers, migration, debtor, verification, limiter, fixed, memory.open_rblocks)


def _creditor(
    memory: RankMemory, loan_table: LoanTable, limiter: QueryLimiter, parallel: TensorParallel, clock: Clock
) -> Creditor:
    shape = memory.shape
    return Creditor(
        memory.pool.tensor_BLK2ND,
        loan_table,
        shape.query_heads_per_rank,
        torch_dtype(shape),
        memory.scale,
        clock,
        limiter,
        rank=parallel.rank,
        num_ranks=parallel.size,
        head_dim=shape.head_dim,
    )


def _warm_up(memory: RankMemory, creditor: Creditor, clock: Clock) -> QueryCosts:
    costs = QueryCosts(creditor.warm_up(), None)
    if memory.host is not None:
        dtype = torch_dtype(memory.shape)
        costs = costs._replace(host_query_us=memory.host.warm_up(memory.shape.query_heads_per_rank, dtype, clock))
    logger.info("pool of %s", memory.pool.describe())
    if memory.host_pool is not None:
        logger.info("host memory of %s", memory.host_pool.describe())
    return costs
