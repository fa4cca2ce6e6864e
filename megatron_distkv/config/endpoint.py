"""Where a TCP listener is: a host and a port."""

from typing import NamedTuple
from urllib.parse import urlsplit


class Endpoint(NamedTuple):
    host: str
    port: int
    is_tls: bool = False

    def of_rank(self, rank: int) -> "Endpoint":
        return self._replace(port=self.port + rank)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'tls' if self.is_tls else 'tcp'}://{host}:{self.port}"


def parse_endpoint(text: str) -> Endpoint:
    """`tcp://HOST:PORT` or `tls://HOST:PORT`; raises ValueError, one sentence."""
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or not port or parts.scheme not in ("tcp", "tls") or parts.path or parts.query or parts.username:
        raise ValueError(f"{text!r} is not tcp://HOST:PORT")
    return Endpoint(host, port, parts.scheme == "tls")
