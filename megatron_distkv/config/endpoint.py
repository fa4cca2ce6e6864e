"""Where a TCP listener is: a host and a port."""

from typing import Literal, NamedTuple
from urllib.parse import urlsplit

# tls: TCP inside of TLS; nixl: doorbells over TCP, payloads by NIXL.
Carrier = Literal["tcp", "tls", "nixl"]
_CARRIERS: dict[str, Carrier] = {"tcp": "tcp", "tls": "tls", "nixl": "nixl"}


class Endpoint(NamedTuple):
    host: str
    port: int
    carrier: Carrier = "tcp"

    def of_rank(self, rank: int) -> "Endpoint":
        return self._replace(port=self.port + rank)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.carrier}://{host}:{self.port}"


def parse_endpoint(text: str) -> Endpoint:
    """`tcp://HOST:PORT`, or tls:// or nixl://; raises ValueError, one sentence."""
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or not port or parts.scheme not in _CARRIERS or parts.path or parts.query or parts.username:
        raise ValueError(f"{text!r} is not tcp://HOST:PORT")
    return Endpoint(host, port, _CARRIERS[parts.scheme])
