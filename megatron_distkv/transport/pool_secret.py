"""The secret that all members of a pool share, and the proof of knowing it without saying it."""

import hashlib
import hmac
import os
import secrets
from enum import Enum
from pathlib import Path

from megatron_distkv.errors import ConfigError

# The environment variable that holds a pool's secret where no file does.
SECRET_VARIABLE = "DISTKV_SECRET"
# Shorter ones can be guessed.
MIN_SECRET_BYTES = 16
_OTHERS_MAY_READ = 0o077
# A pool without a secret: everybody knows this one, so a proof proves nothing.
OPEN_POOL = b""


class Side(Enum):
    """Who proves: a proof of one side is none of the other, so that nobody gets by with his own proof sent back."""

    CONNECTING = b"distkv connecting"
    LISTENING = b"distkv listening"


def proof(secret: bytes, side: Side, hello: bytes, challenge: bytes) -> bytes:
    """HMAC-SHA256 over both sides' first words, byte by byte as they were sent: both nonces are in them."""
    said = hashlib.sha256(hello).digest() + hashlib.sha256(challenge).digest()
    return hmac.digest(secret, side.value + said, "sha256")


def is_proof(mac: bytes, secret: bytes, side: Side, hello: bytes, challenge: bytes) -> bool:
    return hmac.compare_digest(mac, proof(secret, side, hello, challenge))


def read_secret(file: Path | None) -> bytes:
    """The secret in `file`, else in $DISTKV_SECRET, else OPEN_POOL; raises ConfigError, one sentence."""
    if file is None:
        return _checked(os.environ.get(SECRET_VARIABLE, "").encode(), f"${SECRET_VARIABLE}")
    try:
        mode, secret = file.stat().st_mode, file.read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"cannot read the pool's secret {file}: {error.strerror}") from None
    if mode & _OTHERS_MAY_READ:
        raise ConfigError(f"others may read the pool's secret {file}: `chmod 600 {file}`")
    if not secret:
        raise ConfigError(f"the pool's secret {file} is empty")
    return _checked(secret, str(file))


def write_new_secret(file: Path) -> None:
    """A random secret that only this user may read; raises FileExistsError rather than replace one."""
    fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(fd, "w") as out:
        out.write(secrets.token_hex(32) + "\n")


def _checked(secret: bytes, where: str) -> bytes:
    if secret and len(secret) < MIN_SECRET_BYTES:
        raise ConfigError(f"the pool's secret in {where} has {len(secret)} bytes; it needs {MIN_SECRET_BYTES}")
    return secret
