"""What `distkv gateway` does before it serves."""

import socket

import pytest

from megatron_distkv.cli.listening import listen_on
from megatron_distkv.errors import UserError


def test_who_connects_before_it_serves_waits_and_is_not_refused() -> None:
    with listen_on("127.0.0.1", 0) as listening:
        socket.create_connection(listening.getsockname(), timeout=5).close()
        # And who wants its port hears that it is taken
        with pytest.raises(UserError, match="choose another --port"):
            listen_on(*listening.getsockname())
