"""Why a process ended, from its output and its exit status."""

import re
import signal

# How a command of ours ends that cannot go on: `ERROR sentence`, or `distkv COMMAND: sentence`.
_OWN_SENTENCE = re.compile(r"^(?:ERROR|distkv [a-z]+:) (.+)$", re.MULTILINE)
_TRACEBACK = re.compile(
    r"^(?P<before>.*)\n?Traceback \(most recent call last\):\n(?P<frames>(?:[ \t].*\n|\n)*)(?P<error>\S.*)$",
    re.MULTILINE,
)
# torch puts the rank before each line of an exception.
_RANK_PREFIX = re.compile(r"^\[rank\d+\]: ?", re.MULTILINE)
# Of the interpreter itself, as at a segmentation fault.
_FATAL = re.compile(r"^Fatal Python error: (.+)$", re.MULTILINE)
# What deepspeed's launcher says of the first rank that failed.
_RANK_STATUS = re.compile(r"exits with return code = (-?\d+)")
# Lines that come with an end, and are never its cause: asyncio of a lost peer, and deepspeed's launcher.
_NOISE = re.compile(r"socket\.send\(\) raised exception|\[(launch|runner)\.py:|^\s*$")


def cause_of(output: str, status: int) -> str:
    """One line; `status` as subprocess gives it, below 0 for a signal.

    The first sentence of ours, for what comes after it (other ranks, the launcher) follows from it; else the signal
    that ended it; else its last exception; else the signal that ended a rank of it; else its last line.
    """
    output = _RANK_PREFIX.sub("", output)
    if own := _OWN_SENTENCE.search(output):
        return own[1].strip()
    if fatal := _FATAL.search(output):
        return f"{fatal[1].strip()}{f', {_signal_name(status)}' if status < 0 else ''}"
    if status < 0:
        return f"killed by {_signal_name(status)}"
    if error := _last_exception(output):
        return error
    if (rank := _RANK_STATUS.search(output)) and int(rank[1]) < 0:
        return f"a rank of it was killed by {_signal_name(int(rank[1]))}"
    lines = [line.strip() for line in output.splitlines() if not _NOISE.search(line)]
    return lines[-1] if lines else "it said nothing"


def _last_exception(output: str) -> str | None:
    """Not of those that the interpreter ignored on its way out, nor of the launcher's own."""
    found = [
        match["error"].strip()
        for match in _TRACEBACK.finditer(output)
        if not match["before"].startswith("Exception ignored") and "deepspeed/launcher/" not in match["frames"]
    ]
    return found[-1] if found else None


def _signal_name(status: int) -> str:
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"
