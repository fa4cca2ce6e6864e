"""TLS between members of a pool on different hosts: each shows a certificate that the pool's authority has signed."""

import hashlib
import socket
import ssl
from pathlib import Path
from typing import NamedTuple

from megatron_distkv.errors import ConfigError


class Tls(NamedTuple):
    """`listening` wants a certificate of who connects; `connecting` compares the listener's name with its own."""

    listening: ssl.SSLContext
    connecting: ssl.SSLContext


def load_tls(certificate: Path, key: Path, authority: Path) -> Tls:
    """PEM files; raises ConfigError, one sentence."""
    contexts = []
    for protocol in (ssl.PROTOCOL_TLS_SERVER, ssl.PROTOCOL_TLS_CLIENT):
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        _load(context, certificate, key, authority)
        contexts.append(context)
    return Tls(*contexts)


def fingerprint_of_peer(connection: socket.socket) -> str:
    """SHA-256 of the certificate that the other side has shown; "" where the connection is no TLS."""
    shown = connection.getpeercert(binary_form=True) if isinstance(connection, ssl.SSLSocket) else None
    return hashlib.sha256(shown).hexdigest() if shown else ""


def _load(context: ssl.SSLContext, certificate: Path, key: Path, authority: Path) -> None:
    for file in (certificate, key, authority):
        if not file.is_file():
            raise ConfigError(f"the TLS file {file} is not there")
    try:
        context.load_cert_chain(certificate, key, password=_no_password)
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError(f"the TLS certificate {certificate} and its key {key} cannot be used: {error}") from None
    try:
        context.load_verify_locations(authority)
    except ssl.SSLError as error:
        raise ConfigError(f"the TLS authority {authority} cannot be used: {error}") from None


def _no_password() -> str:
    raise ValueError("the key is encrypted, and nobody is there to type its password")
