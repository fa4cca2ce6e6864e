"""The file of a unix socket. Who comes later under the same name takes its place: then it is not ours to remove."""

import contextlib
from pathlib import Path


class SocketFile:
    """`path` must be bound already."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode = path.stat().st_ino

    def remove(self) -> None:
        """Unless another has taken its place."""
        with contextlib.suppress(FileNotFoundError):
            if self._path.stat().st_ino == self._inode:
                self._path.unlink()
