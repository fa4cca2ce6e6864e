"""Which parts of a pool are started again, when, and what is said of it. Decides only: it starts nothing."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple

# The pause before a part is started again: doubled each time that it fails again, up to the bound.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 2.0, 60.0
# A part that has served for this long is sound: its next end is a first one.
SOUND_AFTER_S = 60.0


class Ended(NamedTuple):
    """How a part ended."""

    status: int  # as subprocess says it: below 0 the number of a signal
    cause: str
    is_in_order: bool = False
    """It did what it was told to (a drain, SIGTERM): it stays away."""
    is_replaced: bool = False
    """Another process has its name in the pool: to start it again would end that one in turn, and so on for ever."""


class _State(Enum):
    SERVES = auto()
    WAITS = auto()  # for the end of its pause
    STARTS = auto()
    AWAY = auto()  # for good


@dataclass
class _Part:
    state: _State = _State.SERVES
    since_s: float = float("-inf")
    num_failures: int = 0  # since it was sound for the last time
    said: str = ""  # the last failure that was told, "" when its recovery was told after it

    @property
    def pause_s(self) -> float:
        return float(min(FIRST_PAUSE_S * 2 ** min(self.num_failures - 1, 30), LONGEST_PAUSE_S))


class Supervisor:
    """Times are seconds of any clock that does not go back. `say` gets one sentence for each change of a part's state.

    A part that keeps failing is tried for ever, at the pace of the longest pause; it is told of when it begins to fail,
    when the cause becomes another one, and when it serves again.
    """

    def __init__(self, parts: Iterable[str], say: Callable[[str], None], start_timeout_s: float) -> None:
        self._parts = {name: _Part() for name in parts}
        self._say = say
        self._start_timeout_s = start_timeout_s
        self.has_seen_failure = False
        """Any part has ended by itself."""

    def note_ended(self, name: str, ended: Ended, now_s: float) -> None:
        part = self._parts[name]
        if ended.is_in_order or ended.is_replaced:
            self.has_seen_failure |= ended.is_replaced
            part.state = _State.AWAY
            self._say(_farewell(name, ended))
            return
        self.has_seen_failure = True
        was_sound = part.state is _State.SERVES and now_s - part.since_s >= SOUND_AFTER_S
        part.num_failures = 1 if was_sound else part.num_failures + 1
        part.state, part.since_s = _State.WAITS, now_s
        self._tell_failure(name, part, f"(exit status {ended.status}): {ended.cause}")

    def note_started(self, name: str, now_s: float) -> None:
        self._parts[name].state, self._parts[name].since_s = _State.STARTS, now_s

    def note_ready(self, name: str, now_s: float) -> None:
        part = self._parts[name]
        part.state, part.since_s = _State.SERVES, now_s
        if part.num_failures == 1:
            self._tell_recovery(name, part)

    def starting(self) -> list[str]:
        """Whose readiness is waited for."""
        return [name for name, part in self._parts.items() if part.state is _State.STARTS]

    def overdue(self, now_s: float) -> list[str]:
        """Those that were started and have not become ready in time: they are to be killed."""
        return [name for name in self.starting() if now_s - self._parts[name].since_s > self._start_timeout_s]

    def may_end(self, name: str) -> bool:
        """False: its end is known already."""
        return self._parts[name].state in (_State.SERVES, _State.STARTS)

    def due(self, now_s: float) -> list[str]:
        """Those to start now."""
        self._tell_who_is_sound(now_s)
        waiting = [(name, part) for name, part in self._parts.items() if part.state is _State.WAITS]
        return [name for name, part in waiting if now_s - part.since_s >= part.pause_s]

    # ------------------------------------------------------------------ what is said

    def _tell_failure(self, name: str, part: _Part, how: str) -> None:
        if part.num_failures == 1:
            self._say(f"{name} ended {how}; starting it again in {part.pause_s:g} s")
        elif how != part.said or part.num_failures == 2:
            bound = f"it is tried again after longer and longer pauses, up to {LONGEST_PAUSE_S:g} s"
            self._say(f"{name} ended again {how}; {bound}")
        part.said = how

    def _tell_recovery(self, name: str, part: _Part) -> None:
        if part.said:
            self._say(f"{name} serves again")
            part.said = ""

    def _tell_who_is_sound(self, now_s: float) -> None:
        """One that has failed twice is believed only when it has served for a while."""
        for name, part in self._parts.items():
            if part.state is _State.SERVES and part.num_failures and now_s - part.since_s >= SOUND_AFTER_S:
                part.num_failures = 0
                self._tell_recovery(name, part)


def _farewell(name: str, ended: Ended) -> str:
    if ended.is_in_order:
        return f"{name} has left the pool in order; it is not started again"
    return f"{name} ended (exit status {ended.status}): {ended.cause}; it is not started again"
