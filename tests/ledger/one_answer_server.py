"""A server that speaks Redis' protocol and has one answer to everything."""

import contextlib
import socket
import threading
from io import BufferedReader
from pathlib import Path


class OneAnswerServer:
    """At a unix socket; `reply` is what it sends, to the byte, whatever command has come."""

    def __init__(self, path: Path, reply: bytes) -> None:
        self.url = f"unix://{path}"
        self.num_asked = 0
        self._reply = reply
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(path))
        self._listening.listen()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def __enter__(self) -> "OneAnswerServer":
        return self

    def __exit__(self, *_: object) -> None:
        """After its clients have left."""
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for thread in list(self._threads):
            thread.join()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                self._threads.append(threading.Thread(target=self._serve, args=(client,)))
                self._threads[-1].start()

    def _serve(self, client: socket.socket) -> None:
        with client, client.makefile("rb") as words, contextlib.suppress(OSError):
            while _read_command(words):
                self.num_asked += 1
                client.sendall(self._reply)


def _read_command(words: BufferedReader) -> list[bytes]:
    """`*NUMBER`, then `$LENGTH` and so many bytes for each word; empty at the end of the stream."""
    num_words = int(words.readline()[1:] or 0)
    return [words.read(int(words.readline()[1:]) + 2)[:-2] for _ in range(num_words)]
