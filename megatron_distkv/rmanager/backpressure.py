"""Creditors that hold this instance's queries back, because they have work of their own: leave them, or wait."""

from collections.abc import Mapping

# A creditor that holds a step back for less than this share of it is no reason to move anything ...
MUCH = 0.2
# ... nor is one that does so now and then: this many steps on end.
PATIENCE_STEPS = 16


class Backpressure:
    """Counts steps; a step without much of it starts the count anew, so nothing moves to and fro."""

    def __init__(self) -> None:
        self._num_steps: dict[str, int] = {}

    def note(self, held_back_s: Mapping[str, float], step_s: float) -> list[str]:
        """What a step of `step_s` seconds waited for, by creditor; returns those that it has been too much for."""
        pressing = [creditor for creditor, waited_s in held_back_s.items() if waited_s > MUCH * step_s]
        self._num_steps = {creditor: self._num_steps.get(creditor, 0) + 1 for creditor in pressing}
        tired = [creditor for creditor, count in self._num_steps.items() if count >= PATIENCE_STEPS]
        for creditor in tired:
            del self._num_steps[creditor]
        return tired
