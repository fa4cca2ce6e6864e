"""The longest context that each instance can have, now and a while ago: instances go, and come back."""

import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from megatron_distkv.ledger import InstanceState, PoolSnapshot
from megatron_distkv.server.pool_memory import longest_context_tokens
from megatron_distkv.server.pool_view import takes_requests_here


class _Seen(NamedTuple):
    until_s: float
    longest: dict[str, int]  # tokens, by instance


class LongestContexts:
    def __init__(self, remembered_for_s: float, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._remembered_for_s = remembered_for_s
        self._clock_s = clock_s
        self._seen: deque[_Seen] = deque()

    def note(self, snapshot: PoolSnapshot) -> None:
        records = [x for x in snapshot.live if takes_requests_here(x) and x.state is InstanceState.UP]
        seen = _Seen(self._clock_s(), {x.instance: longest_context_tokens(snapshot, x) for x in records})
        if self._seen and self._seen[-1].longest == seen.longest:
            self._seen.pop()
        self._seen.append(seen)
        while self._seen[0].until_s < seen.until_s - self._remembered_for_s:
            self._seen.popleft()

    def now(self, pinned: str | None) -> int:
        """Tokens; 0 where no instance lives (or not the `pinned` one)."""
        return _longest(self._seen[-1].longest, pinned) if self._seen else 0

    def lately(self, pinned: str | None) -> int:
        return max((_longest(seen.longest, pinned) for seen in self._seen), default=0)


def _longest(longest: dict[str, int], pinned: str | None) -> int:
    return max((tokens for instance, tokens in longest.items() if pinned in (None, instance)), default=0)
