"""How large the messages between a rank and others' same ranks may become."""

from megatron_distkv.config.instance import InstanceConfig
from megatron_distkv.engine.rank_memory import RankMemory
from megatron_distkv.peers import MailboxSizes

# Migrated rBlocks travel in messages of about this size: large enough for full bandwidth, small enough for a mailbox.
STORE_MESSAGE_BYTES = 8 << 20
# Room for a message's header: the physical ids of a hundred thousand rBlocks.
HEADER_BYTES = 512 << 10
# Of an answer's header, which names nothing.
REPLY_HEADER_BYTES = 4096
# In fixed order a token has several partials: fewer messages than by the tokens of a step alone.
LEAST_FIXED_ANSWERS = 512


def rblocks_per_message(config: InstanceConfig, memory: RankMemory) -> int:
    """Of rBlocks that move."""
    return min(config.lending.max_moved_rblocks_per_step, max(1, STORE_MESSAGE_BYTES // memory.pool.rblock_bytes))


def most_answers(config: InstanceConfig) -> int:
    """Tokens of one question, or, in fixed order, partials of one answer."""
    return max(config.scheduler.max_batched_tokens, LEAST_FIXED_ANSWERS if config.deterministic else 0)


def mailbox_sizes(config: InstanceConfig, memory: RankMemory) -> MailboxSizes:
    """Enough for questions and answers of attention, and for rBlocks that move, in either direction."""
    shape = memory.shape
    rows = most_answers(config) * shape.query_heads_per_rank
    asked_bytes = HEADER_BYTES + rows * shape.head_dim * shape.item_bytes
    answered_bytes = REPLY_HEADER_BYTES + rows * (shape.head_dim + 1) * 4
    moved_bytes = HEADER_BYTES + rblocks_per_message(config, memory) * memory.pool.rblock_bytes
    return MailboxSizes(max(asked_bytes, moved_bytes), max(answered_bytes, moved_bytes))
