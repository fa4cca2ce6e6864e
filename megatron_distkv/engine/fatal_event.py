"""What a process must end for, whichever of its threads has met it."""

import threading


class FatalEvent:
    """Noted by any thread, raised by the main one, which looks now and then."""

    def __init__(self) -> None:
        self._error: BaseException | None = None
        self._lock = threading.Lock()

    def note(self, error: BaseException) -> None:
        """The first is the cause; others follow from it."""
        with self._lock:
            self._error = self._error or error

    def raise_if_noted(self) -> None:
        if self._error is not None:
            raise self._error
