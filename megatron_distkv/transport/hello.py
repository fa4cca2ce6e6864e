"""What a connecting process says of itself, once, before anything else."""

import msgspec

# Raised whenever a frame, a header or the mailbox's layout changes.
PROTOCOL_VERSION = 1
MAX_HELLO_BYTES = 4096


class Hello(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`request_bytes` and `reply_bytes`: the two halves of the mailbox that the connecting side needs."""

    protocol_version: int
    pool: str
    instance_id: str
    epoch: int
    rank: int
    request_bytes: int
    reply_bytes: int


class Welcome(msgspec.Struct, frozen=True):
    """The listener's answer; the mailbox's file descriptor comes with it unless `refusal` says why not."""

    refusal: str = ""
