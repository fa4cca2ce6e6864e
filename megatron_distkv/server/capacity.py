"""How much room there is: what has been promised since the last look, and the longest contexts of late."""

from collections import Counter, deque
from collections.abc import Mapping
from typing import NamedTuple

from megatron_distkv.clock import Clock
from megatron_distkv.pool import Member, Picture
from megatron_distkv.rblock import InstanceId, num_rblocks_for
from megatron_distkv.server.attempt import Attempt

# A request that decodes is as much work as a prompt of so many tokens: each token to come makes a step a little longer.
DECODE_WORK_TOKENS = 64


class InFlight:
    """Requests with their instances, and the work that these have with them: fresher than any heartbeat.

    One that has been promised room counts, though it may not be sent yet.
    """

    def __init__(self) -> None:
        self._instances: dict[Attempt, Member] = {}
        self._prefill_tokens: dict[Attempt, int] = {}
        self._work: Counter[str] = Counter()  # tokens, by instance

    def add(self, attempt: Attempt, member: Member) -> None:
        self._instances[attempt] = member
        self._prefill_tokens[attempt] = attempt.num_prefill_tokens
        self._work[member.instance] += attempt.num_prefill_tokens + DECODE_WORK_TOKENS

    def note_prefilled(self, attempt: Attempt) -> None:
        """Its first token has come: what is left of it is decoding."""
        member = self._instances.get(attempt)
        if member is not None:
            self._work[member.instance] -= self._prefill_tokens[attempt]
            self._prefill_tokens[attempt] = 0

    def remove(self, attempt: Attempt) -> None:
        member = self._instances.pop(attempt, None)
        if member is not None:
            self._work[member.instance] -= self._prefill_tokens.pop(attempt) + DECODE_WORK_TOKENS
            if not self._work[member.instance]:
                del self._work[member.instance]

    def work_at(self, instance: str) -> int:
        """Tokens of prompts that it has to compute yet, and as many more as decoding is worth."""
        return self._work[instance]

    def promised_rblocks(self, picture: Picture) -> Counter[str]:
        """By instance: what its requests still need for the tokens that they have, beside what they hold already."""
        promised: Counter[str] = Counter()
        for attempt, member in self._instances.items():
            needed = num_rblocks_for(attempt.num_tokens_now, member.rblock_size)
            promised[member.instance] += max(0, needed - picture.held_rblocks.get(attempt.request_id, 0))
        return promised


class _Seen(NamedTuple):
    until_s: float
    longest: Mapping[InstanceId, int]  # tokens, by instance


class LongestContexts:
    """The longest context that each instance can have, now and a while ago: instances go, and come back."""

    def __init__(self, remembered_for_s: float, clock: Clock) -> None:
        self._remembered_for_s = remembered_for_s
        self._clock = clock
        self._seen: deque[_Seen] = deque()

    def note(self, picture: Picture) -> None:
        here = {x: tokens for x, tokens in picture.longest_contexts.items() if picture.members[x].takes_requests_here}
        seen = _Seen(self._clock.monotonic_s(), here)
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


def _longest(longest: Mapping[InstanceId, int], pinned: str | None) -> int:
    return max((tokens for instance, tokens in longest.items() if pinned in (None, instance)), default=0)
