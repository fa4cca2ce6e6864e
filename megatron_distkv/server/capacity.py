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
    """Requests with their instances, and the work that these have: tokens of prompts to compute, and what decoding is
    worth.

    Of each instance what it has reported and what this gateway has given and seen end since, so that gateways count
    alike; and never less than this gateway's own requests, which are fresher than any report. One that has been
    promised room counts, though it may not be sent yet.
    """

    def __init__(self) -> None:
        self._instances: dict[Attempt, Member] = {}
        self._prefill_tokens: dict[Attempt, int] = {}
        self._own = Counter[str]()  # by instance
        self._reported: dict[str, int] = {}
        self._since_report = Counter[str]()

    def note_reports(self, picture: Picture) -> None:
        """There has been a look at the pool."""
        reported = {str(member.instance): _reported_work(member) for member in picture.up}
        same = {name for name, work in reported.items() if self._reported.get(name) == work}
        self._since_report = Counter({name: work for name, work in self._since_report.items() if name in same})
        self._reported = reported

    def add(self, attempt: Attempt, member: Member) -> None:
        self._instances[attempt] = member
        self._prefill_tokens[attempt] = attempt.num_prefill_tokens
        self._count(member, attempt.num_prefill_tokens + DECODE_WORK_TOKENS)

    def note_prefilled(self, attempt: Attempt) -> None:
        """Its first token has come: what is left of it is decoding."""
        member = self._instances.get(attempt)
        if member is not None:
            self._count(member, -self._prefill_tokens[attempt])
            self._prefill_tokens[attempt] = 0

    def remove(self, attempt: Attempt) -> None:
        member = self._instances.pop(attempt, None)
        if member is not None:
            self._count(member, -self._prefill_tokens.pop(attempt) - DECODE_WORK_TOKENS)

    def work_at(self, instance: str) -> int:
        return max(self._own[instance], self._reported.get(instance, 0) + self._since_report[instance])

    def _count(self, member: Member, tokens: int) -> None:
        for counts in (self._own, self._since_report):
            counts[member.instance] += tokens
            if not counts[member.instance]:
                del counts[member.instance]

    def promised_rblocks(self, picture: Picture) -> Counter[str]:
        """By instance: what its requests still need for the tokens that they have, beside what they hold already."""
        promised: Counter[str] = Counter()
        for attempt, member in self._instances.items():
            needed = num_rblocks_for(attempt.num_tokens_now, member.rblock_size)
            promised[member.instance] += max(0, needed - picture.held_rblocks.get(attempt.request_id, 0))
        return promised


def _reported_work(member: Member) -> int:
    return member.prefill_tokens_left + DECODE_WORK_TOKENS * (member.num_running + member.num_waiting)


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
