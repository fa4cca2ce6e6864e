"""A ledger server behind TLS: the embedded Valkey is built without it, so a terminator of our own stands before it."""

import contextlib
import socket
import ssl
import subprocess
import threading
from pathlib import Path


def make_authority(directory: Path, name: str) -> Path:
    """The certificate of a new authority; its key lies beside it."""
    file = directory / f"{name}.pem"
    _openssl("req", "-x509", *_new_key(file), "-out", file, "-days", "2", "-subj", f"/CN={name}")
    return file


def make_certificate(directory: Path, authority: Path, name: str) -> Path:
    """A certificate for localhost, signed by `authority`."""
    file, request, extensions = directory / f"{name}.pem", directory / f"{name}.csr", directory / f"{name}.ext"
    extensions.write_text("subjectAltName=DNS:localhost")
    _openssl("req", *_new_key(file), "-out", request, "-subj", f"/CN={name}")
    _openssl(
        "x509", "-req", "-in", request, "-CA", authority, "-CAkey", authority.with_suffix(".key"), "-CAcreateserial",
        "-out", file, "-days", "2", "-extfile", extensions,
    )  # fmt: skip
    return file


def _new_key(certificate: Path) -> list[object]:
    return ["-newkey", "rsa:2048", "-nodes", "-keyout", certificate.with_suffix(".key")]


def _openssl(*arguments: object) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


class TlsTerminator:
    """Takes TLS at `port` of localhost and hands it on to a unix socket. With `authority` it wants a client's too."""

    def __init__(self, upstream: Path, certificate: Path, authority: Path | None = None) -> None:
        self._upstream = upstream
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificate, certificate.with_suffix(".key"))
        if authority is not None:
            self._context.load_verify_locations(authority)
            self._context.verify_mode = ssl.CERT_REQUIRED
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._thread.join()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                plain, _ = self._listening.accept()
                threading.Thread(target=self._serve, args=(plain,), daemon=True).start()

    def _serve(self, plain: socket.socket) -> None:
        with (
            plain,
            contextlib.suppress(OSError),
            self._context.wrap_socket(plain, server_side=True) as client,
            socket.socket(socket.AF_UNIX) as server,
        ):
            server.connect(str(self._upstream))
            back = threading.Thread(target=_pump, args=(server, client), daemon=True)
            back.start()
            _pump(client, server)
            back.join()


def _pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    for end in (source, target):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
