"""Work beside the main thread. A part that ends by an exception is noticed: it never lives on deaf."""

import threading
from collections.abc import Callable

from megatron_distkv.errors import DistkvError
from megatron_distkv.log import get_logger

logger = get_logger(__name__)
# What hangs at the end is not waited for longer than this: it ends with the process.
STOP_WITHIN_S = 2.0


class Fatal:
    """The first error that ends this part of the pool, from whatever thread; its main thread looks for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._event = threading.Event()
        self._error: BaseException | None = None

    def report(self, error: BaseException) -> None:
        with self._lock:
            if self._error is None:
                self._error = error
        self._event.set()

    def raise_if_any(self) -> None:
        """As a DistkvError, which the command line prints as one sentence."""
        if self._error is not None:
            if isinstance(self._error, DistkvError):
                raise self._error
            name = type(self._error).__name__
            raise DistkvError(f"a part of this process has failed: {name}: {self._error}") from self._error

    def wait(self, timeout_s: float) -> bool:
        return self._event.wait(timeout_s)


class Periodic:
    """A thread that does `work` again and again, `interval_s()` apart, sooner when it is hurried.

    Whatever `work` raises is fatal: it catches itself what may go wrong.
    """

    def __init__(self, name: str, work: Callable[[], None], interval_s: Callable[[], float], fatal: Fatal) -> None:
        self._name = name
        self._work = work
        self._interval_s = interval_s
        self._fatal = fatal
        self._wake = threading.Event()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Once; later calls do nothing."""
        if self._thread.ident is None:
            self._thread.start()

    def hurry(self) -> None:
        """Do it now rather than later; never waits."""
        self._wake.set()

    def stop(self) -> None:
        self._is_stopping = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(STOP_WITHIN_S)

    def _run(self) -> None:
        while True:
            self._wake.wait(self._interval_s())
            if self._is_stopping:
                return
            self._wake.clear()
            try:
                self._work()
            except BaseException as error:
                if not isinstance(error, DistkvError):
                    logger.exception("%s has failed", self._name)
                self._fatal.report(error)
                return
