"""How the ranks of an instance are reached: words of one line, as the ledger carries it.

unix:PATH        shared memory behind a socket of the instance's host; `{rank}` in the path is the rank
host:ID          which host that is; without it: this one
tcp://HOST:PORT  TCP; rank r listens at PORT + r
tls://HOST:PORT  the same, inside of TLS
ranks:N          tensor-parallel ranks of the instance; without it: 1
"""

import functools
import os
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, unquote

from megatron_distkv.config.endpoint import Endpoint, parse_endpoint

RANK = "{rank}"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_MAX_RANKS = 4096


class Address(NamedTuple):
    unix_path: str | None = None
    host_id: str = ""
    endpoint: Endpoint | None = None
    num_ranks: int = 1

    @property
    def is_here(self) -> bool:
        """Whether there is a socket that this process can open; containers of one host may not see each other's."""
        return self.unix_path is not None and self.host_id in ("", this_host())

    def of_rank(self, rank: int) -> "Address":
        path = self.unix_path and self.unix_path.replace(
            RANK, str(rank)
        )  # not format(): another's word is not our code
        return self._replace(unix_path=path, endpoint=self.endpoint and self.endpoint.of_rank(rank))

    def __str__(self) -> str:
        words = []
        if self.unix_path is not None:
            words.append(f"unix:{quote(self.unix_path, safe='/{}')}")
        if self.unix_path is not None and self.host_id:
            words.append(f"host:{quote(self.host_id)}")
        if self.endpoint is not None:
            words.append(str(self.endpoint))
        if self.num_ranks != 1:
            words.append(f"ranks:{self.num_ranks}")
        return " ".join(words)


def parse_address(text: str) -> Address:
    """Raises ValueError, one sentence."""
    address = Address()
    for word in text.split():
        kind, _, rest = word.partition(":")
        if kind == "unix":
            address = address._replace(unix_path=unquote(rest))
        elif kind == "host":
            address = address._replace(host_id=unquote(rest))
        elif kind in ("tcp", "tls", "nixl"):
            address = address._replace(endpoint=parse_endpoint(word))
        elif kind == "ranks" and rest.isascii() and rest.isdigit() and 1 <= int(rest) <= _MAX_RANKS:
            address = address._replace(num_ranks=int(rest))
        else:
            raise ValueError(f"{word!r} is no part of an address: unix:PATH, tcp://HOST:PORT or tls://HOST:PORT")
    if not address.unix_path and address.endpoint is None:
        raise ValueError(f"the address {text!r} names neither a socket nor a host")
    return address


@functools.lru_cache(maxsize=1 << 14)  # of a pool's members, looked at several times a second
def is_elsewhere(address: str) -> bool:
    """Whether a member says that it is on another host: the sockets that it names are none of ours. False: unknown."""
    try:
        return parse_address(address).host_id not in ("", this_host())
    except ValueError:
        return False


@functools.cache
def this_host() -> str:
    """Changes with each start of the machine; the same in all of its containers."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return os.uname().nodename
