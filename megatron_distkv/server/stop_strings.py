"""Ends a text at the first stop string; holds back what may still become one."""

from collections.abc import Sequence


class StopStrings:
    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.has_stopped = False

    def add(self, text: str) -> str:
        """The part of `text`, and of what was held, that can be sent. After a stop nothing more comes."""
        if self.has_stopped:
            return ""
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.has_stopped = True
            return self._release(min(found))
        return self._release(len(self._held) - self._num_to_hold())

    def flush(self) -> str:
        return "" if self.has_stopped else self._release(len(self._held))

    def _num_to_hold(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._stops):
                return size
        return 0

    def _release(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        return text
