"""A line between two addresses of this host that is slow, stalls, or loses everything from some moment on."""

import contextlib
import random
import select
import socket
import threading
import time

_PIECE_BYTES = 16 << 10


class SlowLine:
    """Takes connections at `host`:`port` and carries them to `upstream`, each piece `delay_s` later.

    One piece in `stall_one_in` waits ten times as long, as after a lost packet. `cut()`: what is sent later never
    arrives, and nobody is told.
    """

    def __init__(self, host: str, port: int, upstream: str, delay_s: float = 0.0, stall_one_in: int = 0) -> None:
        self._upstream = (upstream, port)
        self._delay_s = delay_s
        self._stall_one_in = stall_one_in
        self._random = random.Random(1)
        self._is_cut = threading.Event()
        self._is_closed = threading.Event()
        self._listening = socket.create_server((host, port))
        self.num_pieces = 0
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def cut(self) -> None:
        self._is_cut.set()

    def close(self) -> None:
        self._is_closed.set()
        for thread in list(self._threads):
            thread.join()
        self._listening.close()

    def _accept(self) -> None:
        while not self._is_closed.is_set():
            if select.select([self._listening], [], [], 0.05)[0]:
                near, _ = self._listening.accept()
                thread = threading.Thread(target=self._carry, args=(near,))
                self._threads.append(thread)
                thread.start()

    def _carry(self, near: socket.socket) -> None:
        with near, socket.create_connection(self._upstream) as far, contextlib.suppress(OSError):
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while not self._is_closed.is_set():
                ready, _, _ = select.select([near, far], [], [], 0.05)
                if self._is_cut.is_set():
                    continue
                for end in ready:
                    piece = end.recv(_PIECE_BYTES)
                    if not piece:
                        return
                    self.num_pieces += 1
                    stalls = self._stall_one_in and not self._random.randrange(self._stall_one_in)
                    time.sleep(self._delay_s * (10 if stalls else 1))
                    (far if end is near else near).sendall(piece)
