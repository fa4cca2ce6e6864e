"""Where other members of the pool come in to one rank: a socket of this host, and TCP where the configuration says."""

from collections.abc import Callable
from pathlib import Path

from megatron_distkv.address import Address, parse_address, this_host
from megatron_distkv.config.network import NetworkConfig
from megatron_distkv.engine.addresses import rank_address
from megatron_distkv.log import get_logger
from megatron_distkv.transport import (
    OPEN_POOL,
    Handler,
    Hello,
    Listener,
    OnFatal,
    Tls,
    load_tls,
)

logger = get_logger(__name__)


class Listeners:
    """Open until `close`. Raises UserError where nobody can listen."""

    def __init__(
        self,
        network: NetworkConfig,
        socket_address: str,
        rank: int,
        pool: str,
        handler: Handler,
        *,
        secret: bytes,
        on_disconnect: Callable[[Hello], None],
        on_fatal: OnFatal | None = None,
    ) -> None:
        """`socket_address`: `unix:PATH` of this rank. `on_fatal`: as a Listener's."""
        addresses = [socket_address] if network.shared_memory else []
        if network.endpoint is not None:
            addresses.append(str(network.endpoint.of_rank(rank)._replace(carrier=network.carrier)))
        tls = tls_of(network)
        self._listeners: list[Listener] = []
        try:
            for address in addresses:
                self._listeners.append(
                    Listener(
                        address,
                        pool,
                        handler,
                        secret=secret,
                        tls=tls,
                        on_disconnect=on_disconnect,
                        on_fatal=on_fatal,
                    )
                )
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for listener in self._listeners:
            listener.close()


def advertised_address(network: NetworkConfig, run_dir: Path, name: str, num_ranks: int) -> str:
    """What the ledger tells others: all ways to all ranks."""
    here = parse_address(rank_address(run_dir, name)).unix_path if network.shared_memory else None
    return str(Address(here, this_host() if here else "", network.advertised, num_ranks))


def tls_of(network: NetworkConfig) -> Tls | None:
    """Raises ConfigError for files that cannot be used."""
    if network.certificate_file is None:
        return None
    assert network.key_file is not None
    assert network.authority_file is not None
    return load_tls(network.certificate_file, network.key_file, network.authority_file)


def warn_of_open_listeners(network: NetworkConfig, secret: bytes, pool: str) -> None:
    """One sentence each for what an operator should not leave as it is."""
    if network.endpoint is not None and not network.is_tls:
        logger.warning(
            "WARNING: channels of pool %r at %s are not encrypted: who sees the network reads and changes KV; "
            "set network.certificate_file, key_file and authority_file",
            pool,
            network.endpoint,
        )
    if secret == OPEN_POOL:
        who = "who reaches this host" if network.endpoint is not None else "this user's processes on this host"
        logger.warning(
            "WARNING: pool %r has no secret: all of %s are members and may lend, borrow and read what they are lent; "
            "set ledger.secret_file or DISTKV_SECRET",
            pool,
            who,
        )
