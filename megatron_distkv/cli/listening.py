"""Where a gateway listens."""

import socket

from megatron_distkv.errors import UserError

# Connections that wait to be accepted.
BACKLOG = 2048


def listen_on(host: str, port: int) -> socket.socket:
    """Port 0 takes a free one; raises UserError for one that is taken, or not of this host."""
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(BACKLOG)  # before it says that it is ready: who connects at once waits, and is not refused
    except OSError as error:
        listening.close()
        raise UserError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port") from None
    return listening
