"""A real ledger server for this room's tests."""

from collections.abc import Iterator

import pytest

from megatron_distkv.ledger.embedded_server import EmbeddedServer


@pytest.fixture(scope="session")
def server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer() as running:
        yield running
