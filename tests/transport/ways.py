"""The ways for two processes to talk: what the contract of channels is tested over."""

import os
import socket
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import NamedTuple

import pytest

from megatron_distkv.transport import OPEN_POOL, Channel, Hello, Tls, connect, load_tls
from megatron_distkv.transport.nixl_link import nixl_package
from tests.ledger.tls_server import make_authority, make_certificate

os.environ.setdefault("UCX_TLS", "tcp,self")  # NIXL as between hosts: it would share memory on this one
WAYS = ("unix", "tcp", "tls", "nixl")


class Way(NamedTuple):
    """`listen` is a listener's word for its address, `address` a peer's."""

    listen: str
    address: str
    tls: Tls | None = None

    def connect(self, hello: Hello, secret: bytes = OPEN_POOL) -> Channel:
        return connect(self.address, hello, peer="a", timeout_s=5, secret=secret, tls=self.tls)


def make_way(kind: str, directory: Path) -> Way:
    if kind == "unix":
        return Way(f"unix:{directory}/way.sock", f"unix:{directory}/way.sock")
    port = free_port()
    if kind == "nixl":
        if nixl_package() is None:
            pytest.skip("NIXL is not installed: pip install megatron-distkv[nixl]")
        return Way(f"nixl://127.0.0.1:{port}", f"nixl://127.0.0.1:{port}")
    if kind == "tcp":
        return Way(f"tcp://127.0.0.1:{port}", f"tcp://127.0.0.1:{port}")
    return Way(f"tcp://127.0.0.1:{port}", f"tls://localhost:{port}", member_tls())


def free_port(count: int = 1) -> int:
    """The first of `count` ports in a row that nobody listens at now."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as first:
            port = int(first.getsockname()[1])
            try:
                for other in range(port + 1, port + count):
                    socket.create_server(("127.0.0.1", other)).close()
            except (OSError, OverflowError):
                continue
            return port


class Certificates(NamedTuple):
    authority: Path
    certificate: Path

    @property
    def key(self) -> Path:
        return self.certificate.with_suffix(".key")


@cache
def make_certificates(name: str = "pool") -> Certificates:
    """An authority of that name, and a certificate that it has signed for localhost."""
    directory = Path(mkdtemp(prefix="distkv-tls-"))
    authority = make_authority(directory, name)
    return Certificates(authority, make_certificate(directory, authority, f"{name}-member"))


@cache
def member_tls() -> Tls:
    files = make_certificates()
    return load_tls(files.certificate, files.key, files.authority)
