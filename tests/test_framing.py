"""Messages come out as they went in, however the stream is cut, and garbage ends it with one error."""

import random

import msgspec
import pytest

from megatron_distkv import framing
from megatron_distkv.messages import FromInstance, TokenOutput

DECODER = msgspec.msgpack.Decoder(FromInstance)
MESSAGES = [TokenOutput(f"r{number}", list(range(number))) for number in range(40)]


@pytest.mark.parametrize("seed", range(5))
def test_however_the_stream_is_cut(seed: int) -> None:
    rng, frames = random.Random(seed), framing.Frames(DECODER)
    data, came = b"".join(map(framing.pack, MESSAGES)), []
    while data:
        size = rng.choice((1, 2, 3, 5, 40, 1000))
        came += frames.add(data[:size])
        data = data[size:]
    assert came == MESSAGES


def test_a_message_waits_for_its_end() -> None:
    frames, data = framing.Frames(DECODER), framing.pack(MESSAGES[9])
    assert frames.add(data[:-1]) == []
    assert frames.add(data[-1:] + data) == [MESSAGES[9]] * 2


@pytest.mark.parametrize(
    "garbage", [b"\xff\xff\xff\xff", b"\x00\x00\x00\x02\x00\x00", b"\x00\x01\x86\xa0" + b"\x91" * 100_000]
)
def test_garbage_is_one_error(garbage: bytes) -> None:
    with pytest.raises((ValueError, msgspec.MsgspecError)):
        framing.Frames(DECODER).add(garbage)
