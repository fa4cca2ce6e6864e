"""What a ledger server says of the pool that tests have, from a connection of its own."""

from megatron_distkv.ledger import PoolSnapshot
from megatron_distkv.ledger.embedded_server import EmbeddedServer
from megatron_distkv.ledger.opening import open_ledger


def snapshot(server: EmbeddedServer) -> PoolSnapshot:
    ledger = open_ledger(server.url, "default")
    try:
        return ledger.snapshot()
    finally:
        ledger.close()
