"""One log format for every process: time, level, instance, message."""

import logging
import sys

_FORMAT = "%(asctime)s.%(msecs)03d %(levelname).1s {who} %(name)s: %(message)s"


def get_logger(name: str) -> logging.Logger:
    """The logger of one module, with the package's name cut off: `distkv.rmanager.borrowing`."""
    return logging.getLogger(name.replace("megatron_distkv", "distkv", 1))


def setup_logging(who: str, level: str = "INFO") -> None:
    """Send this process's log to stderr; `who` is the instance id or the process's role."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(_FORMAT.format(who=who), datefmt="%H:%M:%S"))
    root = logging.getLogger("distkv")
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    root.propagate = False
