"""Both sides of a handshake (the order of words: hello.py). Nothing is allocated or mapped before the proof."""

import os
from enum import StrEnum
from typing import TypeVar

import msgspec

from megatron_distkv import metrics
from megatron_distkv.errors import DistkvError, UnreadableMessage
from megatron_distkv.messages import decode
from megatron_distkv.transport.hello import (
    PROTOCOL_VERSION,
    Challenge,
    Hello,
    Proof,
    Welcome,
    new_nonce,
)
from megatron_distkv.transport.link import Link, PeerLeft, Wire
from megatron_distkv.transport.pool_secret import Side, is_proof, proof

_T = TypeVar("_T")
_FIRST_WORD: msgspec.msgpack.Decoder[Challenge | Welcome] = msgspec.msgpack.Decoder(Challenge | Welcome)
_LAST_WORD: msgspec.msgpack.Decoder[Welcome] = msgspec.msgpack.Decoder(Welcome)


class Fault(StrEnum):
    """Why a channel was refused, for metrics."""

    NOT_A_HELLO = "not_a_hello"
    VERSION = "version"
    POOL = "pool"
    MAILBOX = "mailbox"
    SECRET = "secret"


class HelloRefused(DistkvError):
    """A peer was told why it gets no channel."""

    def __init__(self, fault: Fault, sentence: str, peer: str = "somebody") -> None:
        super().__init__(sentence)
        self.fault = fault
        self.peer = peer


class Greeting:
    """The listener's side, one per connection: `receive`, then `welcome`."""

    def __init__(self, wire: Wire, secret: bytes) -> None:
        self._wire = wire
        self._secret = secret
        self._hello = b""
        self._challenge = b""

    def receive(self, pool: str, max_mailbox_bytes: int) -> Hello:
        """The peer's hello, proven; raises HelloRefused after telling the peer why, OSError when it is gone."""
        try:
            hello = self._hear(pool, max_mailbox_bytes)
            self._challenge = msgspec.msgpack.encode(Challenge(new_nonce()))
            self._wire.say(self._challenge)
            self._demand_proof(hello)
        except HelloRefused as refused:
            metrics.REFUSED_CHANNELS.labels(refused.fault.value).inc()
            self._wire.say(msgspec.msgpack.encode(Welcome(str(refused))))
            raise
        return hello

    def welcome(self, hello: Hello) -> Link:
        """Nothing is allocated for a peer before this."""
        mac = proof(self._secret, Side.LISTENING, self._hello, self._challenge)
        return self._wire.welcome(msgspec.msgpack.encode(Welcome(mac=mac)), hello)

    def _hear(self, pool: str, max_mailbox_bytes: int) -> Hello:
        self._hello = _hear(self._wire)
        try:
            hello = decode(self._hello, Hello)
        except UnreadableMessage as error:
            raise HelloRefused(Fault.NOT_A_HELLO, str(error)) from None
        _check(hello, pool, max_mailbox_bytes)
        return hello

    def _demand_proof(self, hello: Hello) -> None:
        try:
            mac = decode(_hear(self._wire), Proof).mac
        except UnreadableMessage:
            mac = b""
        if not is_proof(mac, self._secret, Side.CONNECTING, self._hello, self._challenge):
            raise HelloRefused(Fault.SECRET, "it does not know this pool's secret", hello.instance_id)


def introduce(wire: Wire, hello: Hello, secret: bytes) -> Link:
    """The connecting side: a link to a listener that has proven itself; raises DistkvError, OSError."""
    said = msgspec.msgpack.encode(hello)
    wire.say(said)
    challenge = _hear(wire)
    answer = _decode(challenge, _FIRST_WORD)
    if isinstance(answer, Welcome):
        raise DistkvError(answer.refusal or "it did not ask for a proof")
    wire.say(msgspec.msgpack.encode(Proof(proof(secret, Side.CONNECTING, said, challenge))))
    data, fds = wire.hear_welcome()
    try:
        welcome = _decode(data, _LAST_WORD)
        if welcome.refusal:
            raise DistkvError(welcome.refusal)
        if not is_proof(welcome.mac, secret, Side.LISTENING, said, challenge):
            raise DistkvError("the listener does not know this pool's secret")
        return wire.link(fds, hello)
    finally:
        for fd in fds:
            os.close(fd)


def _check(hello: Hello, pool: str, max_mailbox_bytes: int) -> None:
    name = hello.instance_id
    if hello.protocol_version != PROTOCOL_VERSION:
        sentence = f"protocol version {hello.protocol_version} meets version {PROTOCOL_VERSION}"
        raise HelloRefused(Fault.VERSION, sentence, name)
    if hello.pool != pool:
        raise HelloRefused(Fault.POOL, f"this is pool {pool!r}, not {hello.pool!r}", name)
    if min(hello.request_bytes, hello.reply_bytes) < 1:
        raise HelloRefused(Fault.MAILBOX, "a mailbox half needs at least one byte", name)
    if hello.request_bytes + hello.reply_bytes > max_mailbox_bytes:
        raise HelloRefused(Fault.MAILBOX, f"a mailbox may have at most {max_mailbox_bytes} bytes", name)


def _hear(wire: Wire) -> bytes:
    data = wire.hear()
    if not data:
        raise PeerLeft("it has closed the connection")
    return data


def _decode(data: bytes, decoder: "msgspec.msgpack.Decoder[_T]") -> _T:
    if not data:
        raise DistkvError("it closed the connection")
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise DistkvError(f"its answer cannot be read: {error}") from None
