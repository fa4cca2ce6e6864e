"""What must become true, but not at once: jobs and heartbeats take their time, more of it on a busy machine."""

import time
from collections.abc import Callable

# Generous: nothing is measured by it.
SOON_S = 30.0


def wait_until(condition: Callable[[], object], otherwise: Callable[[], object] = lambda: "") -> None:
    """Fails with what `otherwise` says."""
    end_s = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < end_s, otherwise()
        time.sleep(0.01)
