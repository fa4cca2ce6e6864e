"""From a URL to a ledger."""

from megatron_distkv.ledger.debt_ledger import DebtLedger
from megatron_distkv.ledger.memory_ledger import MemoryLedger
from megatron_distkv.ledger.redis_ledger import RedisLedger


def open_ledger(url: str, pool: str, *, timeout_s: float = 1.0) -> DebtLedger:
    """The ledger at `url`; raises UserError when no server answers there.

    redis://, rediss:// (TLS) and unix:// reach a server, with user, password and TLS options in the URL as redis-py
    reads them; memory:// is a ledger of this process alone.
    """
    if url == "memory://":
        return MemoryLedger()
    ledger = RedisLedger(url, pool, timeout_s=timeout_s)
    ledger.ping_or_explain()
    return ledger
