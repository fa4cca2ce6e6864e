"""Members that are left alone for a while: lost, wrong, busy, or unable to do what they were asked."""

from megatron_distkv.clock import Clock

# A member that fails again soon after its quarantine stays in the next one for twice as long, up to this.
MAX_S = 60.0
# What it did longer ago than this is forgotten.
FORGOTTEN_AFTER_S = 120.0


class Quarantine:
    """By name. Any thread may call it."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._until_s: dict[str, float] = {}
        self._last_s: dict[str, float] = {}  # how long each one's last quarantine was

    def put(self, member: str, for_s: float) -> None:
        """For `for_s` seconds from now, or as long as it is in quarantine already."""
        self._prune()
        until_s = self._clock.monotonic_s() + for_s
        self._until_s[member] = max(until_s, self._until_s.get(member, until_s))

    def put_for_failing(self, member: str, first_s: float) -> None:
        """For `first_s`, and for twice as long with each failure soon after the last."""
        self._prune()
        for_s = min(MAX_S, 2 * self._last_s[member]) if member in self._last_s else first_s
        self._last_s = {**self._last_s, member: for_s}
        self.put(member, for_s)

    def forgive(self, member: str) -> None:
        """It has done what it was asked."""
        self._last_s.pop(member, None)

    def holds(self, member: str) -> bool:
        return self.left_s(member) > 0

    def left_s(self, member: str) -> float:
        """Seconds until it may be asked again; not above 0: now."""
        return self._until_s.get(member, float("-inf")) - self._clock.monotonic_s()

    def _prune(self) -> None:
        now_s = self._clock.monotonic_s()
        for member, until_s in list(self._until_s.items()):
            if until_s < now_s - FORGOTTEN_AFTER_S:
                self._until_s.pop(member, None)
                self._last_s.pop(member, None)
