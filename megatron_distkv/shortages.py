"""File descriptors run out: servers say so seldom, pause, and go on.

The time here is the real one: it is for accept() of real sockets.
"""

import asyncio
import errno
import logging
import threading
import time
from typing import Any

# What is true many times a second is said once in this time.
SAID_AGAIN_AFTER_S = 10.0


class Seldom:
    """Says what may be true many times a second, but not more often than every `SAID_AGAIN_AFTER_S`."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._silent_until_s = float("-inf")
        self._lock = threading.Lock()

    def warn(self, sentence: str, *args: object) -> None:
        with self._lock:
            if time.monotonic() < self._silent_until_s:
                return
            self._silent_until_s = time.monotonic() + SAID_AGAIN_AFTER_S
        self._logger.warning(sentence, *args)


# What accept() says when the system, or this process, has no file descriptor or no memory left for one more.
_SHORTAGE = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


def calm_shortages(loop: asyncio.AbstractEventLoop, logger: logging.Logger) -> None:
    """Servers of this loop say seldom that they cannot accept; asyncio tells each vain try, with a stack.

    It pauses and goes on by itself.
    """
    shortage = Seldom(logger)

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, OSError) and error.errno in _SHORTAGE and "accept" in context.get("message", ""):
            shortage.warn("no connection can be taken for now (%s): trying again", error)
        else:
            loop.default_exception_handler(context)

    loop.set_exception_handler(handle)
