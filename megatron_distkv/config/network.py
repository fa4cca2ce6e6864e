"""How members of a pool on other hosts are reached."""

from pathlib import Path
from typing import Any, Literal

from pydantic import field_validator, model_validator

from megatron_distkv.config.base import FrozenConfig
from megatron_distkv.config.endpoint import Endpoint, parse_endpoint

# Addresses to listen at that nobody can be sent to.
_ALL_INTERFACES = ("0.0.0.0", "::")


class NetworkConfig(FrozenConfig):
    listen: str | None = None
    """`tcp://HOST:PORT`: members on other hosts may use this one's memory over TCP; rank r listens at PORT + r. Without
    it only members of this host may."""
    advertised_host: str | None = None
    """The name under which others reach HOST, and the name in the certificate; needed where HOST is all interfaces."""
    shared_memory: bool = True
    """False: members of this host use TCP too."""
    carrier: Literal["tcp", "nixl"] = "tcp"
    """What carries messages to this member from other hosts; nixl needs the extra of that name on both sides, and does
    not encrypt."""
    certificate_file: Path | None = None
    """PEM. With it channels to and from other hosts are TLS and nothing else; the two files below are needed too."""
    key_file: Path | None = None
    """PEM, without a password."""
    authority_file: Path | None = None
    """PEM of the authority that has signed the certificates of all members."""

    @field_validator("listen")
    @classmethod
    def _is_an_endpoint(cls, listen: str | None) -> str | None:
        if listen is not None and parse_endpoint(listen).carrier != "tcp":
            raise ValueError("write tcp://HOST:PORT; the certificate makes it TLS, carrier makes it NIXL")
        return listen

    @model_validator(mode="after")
    def _is_complete(self) -> Any:
        files = (self.certificate_file, self.key_file, self.authority_file)
        if any(files) and not all(files):
            raise ValueError("TLS needs all of certificate_file, key_file and authority_file")
        if self.is_tls and self.carrier == "nixl":
            raise ValueError("NIXL does not encrypt: leave out the certificate, or carrier")
        if self.listen is None and not self.shared_memory:
            raise ValueError("without shared_memory it needs listen, or nobody can reach it")
        if self.listen is not None and self._host in _ALL_INTERFACES and self.advertised_host is None:
            raise ValueError(f"others cannot be sent to {self._host}: set advertised_host")
        return self

    @property
    def endpoint(self) -> Endpoint | None:
        """Where rank 0 listens."""
        return None if self.listen is None else parse_endpoint(self.listen)

    @property
    def advertised(self) -> Endpoint | None:
        """Where others find rank 0."""
        if self.endpoint is None:
            return None
        return Endpoint(
            self.advertised_host or self.endpoint.host, self.endpoint.port, "tls" if self.is_tls else self.carrier
        )

    @property
    def is_tls(self) -> bool:
        return self.certificate_file is not None

    @property
    def _host(self) -> str:
        assert self.endpoint is not None
        return self.endpoint.host
