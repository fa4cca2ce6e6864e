"""What all clients saw, counted."""

import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tools.bench.chaos.questions import Answer

# Answers of a pool that is full or has shrunk, which a client is to expect.
REFUSALS = ("queue_full", "queue_timeout", "context_length_exceeded", "no_instance")


@dataclass
class Got:
    """One request's choices as they came, and its receipts: where each choice's rBlocks lay (empty when left early)."""

    choices: list[Answer]
    receipts: list[dict[str, Any]]
    longest_pause_s: float = 0.0


@dataclass
class Tally:
    """`lost`: errors that are no refusals. `differences`: answers by what was wrong with them."""

    logprob_tolerance: float
    requests: int = 0
    streamed: int = 0
    answers: int = 0
    mismatches: int = 0
    differences: Counter[str] = field(default_factory=Counter)
    logprobs: int = 0
    greatest_logprob_error: float = 0.0
    tokens: int = 0
    left: int = 0
    retried: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    refusals: list[str] = field(default_factory=list)
    lost: Counter[str] = field(default_factory=Counter)
    longest_pause_s: float = 0.0
    recomputed_tokens: int = 0
    full_recompute_tokens: int = 0
    _asked: Counter[str] = field(default_factory=Counter)  # choices, by gateway
    _had: Counter[str] = field(default_factory=Counter)  # choices of which it is known, by instance
    _num_told: int = 0
    _num_left: int = 0  # choices whose clients left: nobody told who had them
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def expect(self, gateways: Iterable[str], instances: Iterable[str]) -> None:
        """Parts of which requests are counted by themselves."""
        self._asked = Counter(dict.fromkeys(gateways, 0))
        self._had = Counter(dict.fromkeys(instances, 0))

    def note_asked(self, gateway: str, num_choices: int) -> None:
        with self._lock:
            self._asked[gateway] += num_choices

    def note_retried(self) -> None:
        with self._lock:
            self.retried += 1

    def note_answer(self, got: Got, expected: Sequence[Answer], *, is_streamed: bool) -> None:
        has_left = not got.receipts
        with self._lock:
            self.requests += 1
            self.streamed += is_streamed
            self.left += has_left
            self._num_left += len(got.choices) if has_left else 0
            self.longest_pause_s = max(self.longest_pause_s, got.longest_pause_s)
            for one, other in zip(got.choices, expected, strict=True):
                self._compare(one, other, has_left=has_left)
            for receipt in got.receipts:
                self.recomputed_tokens += receipt.get("num_recomputed_tokens", 0)
                self.full_recompute_tokens += receipt.get("num_tokens_at_losses", 0)
                self._num_told += 1
                self._had.update(receipt["instances"])

    def note_error(self, code: str, sentence: str, after_s: float) -> None:
        with self._lock:
            self.requests += 1
            if code in REFUSALS:
                self.refused[code] += 1
                self.refusals.append(f"after {after_s:.1f} s: {sentence}")
            else:
                self.lost[f"{code}: {sentence}"] += 1

    def num_requests_of(self, part: str) -> float:
        """Choices that a gateway was asked for; that an instance had; else those that all gateways were asked for.

        Of choices whose clients left, an instance had the same share as of the others.
        """
        with self._lock:
            if part in self._asked:
                return self._asked[part]
            if part in self._had:
                return self._had[part] * (1 + self._num_left / max(1, self._num_told))
            return self._asked.total()

    def _compare(self, got: Answer, expected: Answer, *, has_left: bool) -> None:
        """Where the client left, what it has must begin the answer."""
        self.answers += 1
        self.tokens += len(got.token_ids)
        if has_left:
            text = expected.text[: len(got.text)]
            expected = Answer(expected.token_ids[: len(got.token_ids)], text, expected.logprobs, got.finish_reason)
        wrong = {
            "tokens": got.token_ids != expected.token_ids,
            "text": got.text != expected.text,
            "finish_reason": got.finish_reason != expected.finish_reason,
            "logprobs": self._logprobs_differ(got, expected, has_left=has_left),
        }
        self.mismatches += any(wrong.values())
        self.differences.update(what for what, differs in wrong.items() if differs)

    def _logprobs_differ(self, got: Answer, expected: Answer, *, has_left: bool) -> bool:
        """As far as the tokens agree."""
        if len(got.logprobs) != len(expected.logprobs) and not has_left:
            return got.token_ids == expected.token_ids
        num_same = len(got.logprobs)
        for place, (one, other) in enumerate(zip(got.token_ids, expected.token_ids, strict=False)):
            if one != other:
                num_same = place
                break
        pairs = list(zip(got.logprobs, expected.logprobs, strict=False))[:num_same]
        error = max((abs(one - other) for one, other in pairs), default=0.0)
        self.logprobs += len(pairs)
        self.greatest_logprob_error = max(self.greatest_logprob_error, error)
        return error > self.logprob_tolerance
