"""The way to the ledger's server: one Lua script per operation, so each is atomic there. Redis or Valkey (>= 6.2)."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from megatron_distkv.errors import LedgerUnavailable
from megatron_distkv.ledger.keys import prefix
from megatron_distkv.ledger.url import explain, warning_about
from megatron_distkv.log import get_logger

logger = get_logger(__name__)
_SCRIPTS = Path(__file__).parent / "scripts"
_OPERATIONS = (
    "register", "heartbeat", "recommend", "borrow", "accept", "release", "reclaim", "restore", "transfer", "loans_of",
    "expire", "deregister", "describe", "snapshot", "lead", "publish_moves",
)  # fmt: skip
_P = ParamSpec("_P")
_T = TypeVar("_T")


def reading(operation: Callable[_P, _T]) -> Callable[_P, _T]:
    """A server that is away, and one whose data somebody else has spoilt, are the same to who asks: no answer."""

    @functools.wraps(operation)
    def guarded(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        try:
            return operation(*args, **kwargs)
        except redis.RedisError as error:
            raise LedgerUnavailable(f"{operation.__name__}: {error}") from error
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError) as error:
            raise LedgerUnavailable(f"{operation.__name__}: the ledger's data cannot be read: {error}") from error

    return guarded


class RedisScripts:
    """Thread-safe. A server silent for `timeout_s` raises LedgerUnavailable: nothing is retried here."""

    def __init__(
        self, url: str, pool: str, *, timeout_s: float = 1.0, clock_ms: Callable[[], int] | None = None
    ) -> None:
        self._url = url
        self._prefix = prefix(pool)
        self._clock_ms = clock_ms  # tests only: time given to the scripts instead of the server's own
        try:
            self._redis = redis.Redis.from_url(
                url,
                decode_responses=True,
                socket_timeout=timeout_s,
                socket_connect_timeout=timeout_s,
                retry=Retry(NoBackoff(), 0),
            )
        except ValueError as error:
            raise explain(url, error) from None
        common = (_SCRIPTS / "_common.lua").read_text()
        self._scripts = {
            name: self._redis.register_script(common + (_SCRIPTS / f"{name}.lua").read_text()) for name in _OPERATIONS
        }

    def ping_or_explain(self) -> None:
        """Raises UserError, one sentence, when the server cannot be used."""
        try:
            self._redis.ping()
        except (redis.RedisError, TypeError, ValueError, OSError) as error:  # TypeError: an option that nobody knows
            raise explain(self._url, error) from None
        warning = warning_about(self._url)
        if warning is not None:
            logger.warning("%s", warning)

    def close(self) -> None:
        self._redis.close()

    def _run(self, operation: str, *arguments: object) -> Any:
        now = str(self._clock_ms()) if self._clock_ms else ""
        return self._scripts[operation](keys=[self._prefix], args=[now, *map(str, arguments)])


def to_ms(seconds: float) -> int:
    return int(seconds * 1000)
