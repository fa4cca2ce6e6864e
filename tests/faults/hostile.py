"""What no honest peer says: any bytes, MessagePack of any shape, and the right shape with wild numbers."""

from typing import Any

import msgspec
from hypothesis import strategies as st

DEEP = b"\x81\xa1x" + b"\x91" * 2000  # arrays in arrays, in a field that nobody knows

numbers = st.one_of(
    st.integers(-3, 40),
    st.sampled_from([-(1 << 63), -(1 << 31), (1 << 31) - 1, 1 << 31, (1 << 32) - 1, (1 << 63) - 1, (1 << 64) - 1]),
)
scalars = st.one_of(
    numbers, st.none(), st.booleans(), st.floats(), st.text(max_size=8), st.binary(max_size=8), st.just("x" * 5000)
)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4)
)


def pack(value: Any) -> bytes:
    return msgspec.msgpack.encode(value)


def wild(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[bytes]:
    """A message whose fields are mostly as given, sometimes of any kind or missing."""
    either = {key: st.one_of(value, value, value, anything) for key, value in fields.items()}
    return st.fixed_dictionaries({}, optional=either).map(pack) | st.fixed_dictionaries(either).map(pack)


messages = st.one_of(st.binary(max_size=60), anything.map(pack), st.just(DEEP))
