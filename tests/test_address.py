"""Addresses come from the ledger, where anybody may have written them: read, or refused with one sentence."""

import contextlib

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_distkv.address import Address, parse_address, this_host
from megatron_distkv.config.endpoint import Endpoint

NAMES = st.text("abc.-%é 1{}:/", min_size=1, max_size=20)
ENDPOINTS = st.builds(
    Endpoint, st.sampled_from(["h", "10.0.0.1", "::1"]), st.integers(1, 65535), st.sampled_from(["tcp", "tls", "nixl"])
)


@given(
    st.builds(Address, NAMES, NAMES | st.just(""), st.none() | ENDPOINTS, st.integers(1, 4096))
    | st.builds(Address, st.none(), st.just(""), ENDPOINTS, st.integers(1, 4096))
)
def test_what_is_written_is_read_again(address: Address) -> None:
    assert parse_address(str(address)) == address


@given(st.text(max_size=80))
@example("tcp://[")
@example("tcp://h:99999")
@example("tcp://h:0")
@example("tcp://user@h:1")
@example("ranks:²")
@example("unix:")
def test_anything_else_is_refused_or_read(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert parse_address(text).num_ranks >= 1


def test_a_rank_has_its_own_socket_and_port() -> None:
    third = parse_address("unix:/run/a.{rank}.sock tls://h:7000 ranks:4").of_rank(3)
    assert third.unix_path == "/run/a.3.sock"
    assert str(third.endpoint) == "tls://h:7003"


@pytest.mark.parametrize(("host_id", "is_here"), [("", True), (this_host(), True), ("another", False)])
def test_memory_is_shared_on_this_host_only(host_id: str, is_here: bool) -> None:
    assert Address("/run/a.sock", host_id).is_here is is_here
    assert not Address(None, host_id, Endpoint("h", 1)).is_here
