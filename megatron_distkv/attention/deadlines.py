"""How long an answer may take before its creditor is asked whether it lives: learnt from the answers so far."""

from collections.abc import Callable, Container

# Half-life of the slowest round trip, in answers: a slow minute is not forgotten at once, and not for ever.
DECAY = 0.5 ** (1 / 1024)
# An answer this many times slower than the slowest of late is a reason to ask ...
FACTOR = 16.0
# ... once so many answers are known.
NUM_LEARNT = 64


class Deadlines:
    """`most_s` is where a creditor is lost, whatever it says; before `least_s` nobody is asked.

    Being slow is no proof of death: who is asked, by a handshake on a connection of its own, and answers, gets all of
    `most_s`. So a machine that is overloaded loses nobody, and one that is gone, or hangs, costs little more than
    `least_s`.
    """

    def __init__(self, least_s: float, most_s: float, is_alive: Callable[[str, float], bool]) -> None:
        """`is_alive(peer, within_s)` asks a peer."""
        self._least_s = min(least_s, most_s)
        self.most_s = most_s
        self._is_alive = is_alive
        self._slowest_s: dict[str, float] = {}
        self._num_answers: dict[str, int] = {}

    def doubtful_after_s(self, peer: str) -> float:
        if self._num_answers.get(peer, 0) < NUM_LEARNT:
            return self.most_s
        return min(self.most_s, max(self._least_s, FACTOR * self._slowest_s[peer]))

    def note(self, peer: str, round_trip_s: float) -> None:
        self._slowest_s[peer] = max(round_trip_s, DECAY * self._slowest_s.get(peer, 0.0))
        self._num_answers[peer] = self._num_answers.get(peer, 0) + 1

    def forget(self, peer: str) -> None:
        """It was lost: one that comes back under its name is another."""
        self._slowest_s.pop(peer, None)
        self._num_answers.pop(peer, None)

    def forget_all_but(self, peers: Container[str]) -> None:
        for peer in [peer for peer in self._slowest_s if peer not in peers]:
            self.forget(peer)

    def is_alive(self, peer: str) -> bool:
        return self._is_alive(peer, self._least_s)
