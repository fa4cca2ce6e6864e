"""What two processes say to each other once, before anything else: who they are, and the proof that they may.

connecting side                         listener
Hello (with a nonce)            ->
                                <-      Challenge (with a nonce) | Welcome (a refusal)
Proof over both                 ->
                                <-      Welcome (its proof over both, and the mailbox) | Welcome (a refusal)
"""

import secrets
from typing import Annotated

import msgspec

# Raised whenever a frame, a header or the mailbox's layout changes.
PROTOCOL_VERSION = 4
MAX_HELLO_BYTES = 4096
NONCE_BYTES = 32

Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
Nonce = Annotated[bytes, msgspec.Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]
Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


def new_nonce() -> bytes:
    return secrets.token_bytes(NONCE_BYTES)


class Hello(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`request_bytes` and `reply_bytes`: the two halves of the mailbox that the connecting side needs.

    It is rank `rank` of `num_ranks`, each of which has the same share of all heads.

    The nonce makes every hello, and so every channel, one of its own.
    """

    protocol_version: int
    pool: Name
    instance_id: Name
    epoch: Count
    rank: Count
    request_bytes: Count
    reply_bytes: Count
    num_ranks: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 1
    nonce: Nonce = msgspec.field(default_factory=new_nonce)


class Challenge(msgspec.Struct, frozen=True, tag="challenge"):
    """The listener takes the hello if its sender proves that it knows the pool's secret."""

    nonce: Nonce


class Proof(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    mac: bytes


class Welcome(msgspec.Struct, frozen=True, tag="welcome"):
    """The listener's last word; on one host the mailbox's file descriptor comes with it. Or `refusal` says why not."""

    refusal: str = ""
    mac: bytes = b""
