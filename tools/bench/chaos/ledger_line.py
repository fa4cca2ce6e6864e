"""A line between the members of a pool and its ledger server, slow on demand.

A process of its own, so that nothing else holds it up: `python -m tools.bench.chaos.ledger_line SOCKET UPSTREAM` takes
connections at the unix socket SOCKET, carries them to UPSTREAM, and reads delays in seconds from its input.
"""

import asyncio
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

PIECE_BYTES = 64 << 10
STARTS_WITHIN_S = 30.0
ENDS_WITHIN_S = 10.0


class LedgerLine:
    """`with LedgerLine(socket, server_url) as line:` members connect to `line.url`."""

    def __init__(self, path: Path, server_url: str) -> None:
        self._path = path
        self._command = [sys.executable, "-m", __spec__.name, str(path), urlsplit(server_url).path]

    @property
    def url(self) -> str:
        return f"unix://{self._path}"

    @property
    def pid(self) -> int:
        return self._process.pid

    def delay(self, one_way_s: float) -> None:
        """From now on, of what is sent either way."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{one_way_s}\n".encode())
        self._process.stdin.flush()

    def __enter__(self) -> "LedgerLine":
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE)
        end_s = time.monotonic() + STARTS_WITHIN_S
        while not self._path.exists():
            if time.monotonic() > end_s or self._process.poll() is not None:
                self.__exit__()
                raise RuntimeError(f"the line to the ledger did not start within {STARTS_WITHIN_S:.0f} s")
            time.sleep(0.02)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()  # its word to end, also when this process is killed
        try:
            self._process.wait(ENDS_WITHIN_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class _Line:
    def __init__(self, upstream: str) -> None:
        self._upstream = upstream
        self._delay_s = 0.0

    async def take_delays(self) -> None:
        """Until the end of the input."""
        reader = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        async for word in reader:
            self._delay_s = float(word)

    async def carry(self, near_in: asyncio.StreamReader, near_out: asyncio.StreamWriter) -> None:
        try:
            far_in, far_out = await asyncio.open_unix_connection(self._upstream)
        except OSError:  # no ledger: who connects sees the end of the stream
            near_out.close()
            return
        await asyncio.gather(self._one_way(near_in, far_out), self._one_way(far_in, near_out), return_exceptions=True)

    async def _one_way(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        """Each piece a delay later than it came; pieces do not wait for each other, as on a long line."""
        pieces: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        sending = asyncio.create_task(_send(pieces, sink))
        data = b"."
        while data:
            try:
                data = await source.read(PIECE_BYTES)
            except OSError:
                data = b""
            pieces.put_nowait((asyncio.get_running_loop().time() + self._delay_s, data))
        await sending


async def _send(pieces: "asyncio.Queue[tuple[float, bytes]]", sink: asyncio.StreamWriter) -> None:
    try:
        while True:
            due_s, data = await pieces.get()
            await asyncio.sleep(due_s - asyncio.get_running_loop().time())
            if not data:
                return
            sink.write(data)
            await sink.drain()
    finally:
        sink.close()


async def _main(path: str, upstream: str) -> None:
    line = _Line(upstream)
    server = await asyncio.start_unix_server(line.carry, path)
    async with server:
        await line.take_delays()


if __name__ == "__main__":
    asyncio.run(_main(*sys.argv[1:]))
