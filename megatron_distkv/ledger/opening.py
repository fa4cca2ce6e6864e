"""From a URL to a ledger: for composition roots. All others get theirs, and need no client of Redis for that."""

from megatron_distkv.clock import Clock, SystemClock
from megatron_distkv.ledger.debt_ledger import DebtLedger
from megatron_distkv.ledger.memory_ledger import MemoryLedger
from megatron_distkv.ledger.redis_ledger import RedisLedger


def open_ledger(url: str, pool: str, *, timeout_s: float = 1.0, clock: Clock | None = None) -> DebtLedger:
    """The ledger at `url`; raises UserError when no server answers there.

    redis://, rediss:// (TLS) and unix:// reach a server, with user, password and TLS options in the URL as redis-py
    reads them; memory:// is a ledger of this process alone, by `clock`: a server has a time of its own.
    """
    if url == "memory://":
        return MemoryLedger((clock or SystemClock()).unix_ms)
    ledger = RedisLedger(url, pool, timeout_s=timeout_s)
    ledger.ping_or_explain()
    return ledger
