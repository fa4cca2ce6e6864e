"""Whole instances that reach each other over TCP or TLS alone lend like neighbours do."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from megatron_distkv.engine.llm import LLM
from megatron_distkv.ledger.embedded_server import EmbeddedServer
from megatron_distkv.request import Request
from megatron_distkv.sampling_params import SamplingParams
from megatron_distkv.transport.nixl_link import nixl_package
from tests.conftest import MakeConfig
from tests.rmanager.test_borrowing import random_prompt
from tests.soon import wait_until
from tests.transport.slow_line import SlowLine
from tests.transport.ways import free_port, make_certificates

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)


def network(*, is_tls: bool = False, **changes: Any) -> dict[str, Any]:
    files = make_certificates()
    tls = {"certificate_file": files.certificate, "key_file": files.key, "authority_file": files.authority}
    return {
        "listen": f"tcp://127.0.0.1:{free_port()}",
        "advertised_host": "localhost",
        "shared_memory": False,
        **(tls if is_tls else {}),
        **changes,
    }


@pytest.fixture
def start(make_config: MakeConfig, server: EmbeddedServer) -> Iterator[Any]:
    with ExitStack() as stack:

        def start(name: str, **rooms: Any) -> LLM:
            config = make_config(name, num_rblocks=16, url=server.url, scheduler={"max_batched_tokens": 48}, **rooms)
            return stack.enter_context(LLM(config))

        yield start


def tokens_of(llm: LLM, prompt: list[int]) -> list[int]:
    (completion,) = llm.generate([prompt], GREEDY)
    return completion.token_ids


@pytest.mark.parametrize("carrier", ["tcp", "tls", "nixl"])
def test_a_prompt_longer_than_the_instance_gives_the_same_tokens(
    carrier: str, start: Any, make_config: MakeConfig
) -> None:
    if carrier == "nixl" and nixl_package() is None:
        pytest.skip("NIXL is not installed: pip install megatron-distkv[nixl]")
    # Given one instance with enough memory, and two of 128 tokens that have nothing but TCP in common
    prompt = random_prompt(200)
    with LLM(make_config("enough", num_rblocks=64)) as enough:
        expected = tokens_of(enough, prompt)
    ways = {"is_tls": carrier == "tls", "carrier": "nixl" if carrier == "nixl" else "tcp"}
    a = start("a", network=network(**ways))
    b = start("b", network=network(**ways))

    # When one of the two is asked
    request = Request("long", prompt, GREEDY)
    a.instance.add(request)
    lent = 0
    while not a.instance.scheduler.is_idle:
        a.instance.step()
        lent = max(lent, b.instance.status(0).lent_rblocks)

    # Then the tokens are the same, with memory of the other, which has it back
    assert request.output_token_ids == expected
    assert lent > 0
    wait_until(lambda: b.instance.status(0).lent_rblocks == 0)


def test_a_member_with_tls_speaks_to_none_without(start: Any, caplog: pytest.LogCaptureFixture) -> None:
    # Given a member that has certificates, and one that has none
    a = start("a", network=network(is_tls=True))
    start("b", network=network())

    # When the first needs memory, then it does without rather than send KV in the clear, and says why
    request = Request("long", random_prompt(120), GREEDY)
    with caplog.at_level(logging.WARNING):
        a.instance.add(request)
        for _ in range(20):
            a.instance.step()
    assert a.instance.status(0).borrowed_rblocks == 0
    assert "speaks no TLS" in caplog.text


def test_open_doors_are_told_of_at_the_start(start: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        start("a", network=network())
    sentences = [record.getMessage() for record in caplog.records if "WARNING" in record.getMessage()]
    assert len(sentences) == 2
    assert "not encrypted" in sentences[0]
    assert "has no secret: all of who reaches this host are members" in sentences[1]


def test_closed_doors_are_not(start: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTKV_SECRET", "correct horse battery staple")
    with caplog.at_level(logging.WARNING):
        start("a", network=network(is_tls=True))
    assert "WARNING" not in " ".join(record.getMessage() for record in caplog.records)


@pytest.fixture
def line() -> Iterator[Any]:
    """`line(**how)`: a slow line, and the network configuration of the member at its far end."""
    lines: list[SlowLine] = []

    def lay(**how: Any) -> tuple[SlowLine, dict[str, Any]]:
        port = free_port()
        lines.append(SlowLine("127.0.0.2", port, "127.0.0.1", **how))
        return lines[-1], network(listen=f"tcp://127.0.0.1:{port}", advertised_host="127.0.0.2")

    yield lay
    for each in lines:
        each.close()


def test_neighbours_share_memory_though_both_could_use_tcp(start: Any, line: Any) -> None:
    # Given two members of one host that listen at both
    a = start("a", network=network(shared_memory=True))
    tcp, far = line()
    start("b", network={**far, "shared_memory": True})

    # When one borrows of the other
    request = Request("long", random_prompt(200), GREEDY)
    a.instance.add(request)
    while not a.instance.scheduler.is_idle:
        a.instance.step()

    # Then not a byte goes over TCP
    assert request.max_borrowed_rblocks["b"] > 0
    assert tcp.num_pieces == 0


def test_a_slow_line_that_stalls_changes_no_token(start: Any, line: Any, make_config: MakeConfig) -> None:
    prompt = random_prompt(160)
    with LLM(make_config("enough", num_rblocks=64)) as enough:
        expected = tokens_of(enough, prompt)
    a = start("a", network=network())
    slow, far = line(delay_s=0.001, stall_one_in=20)
    start("b", network=far)

    assert tokens_of(a, prompt) == expected
    assert slow.num_pieces > 20


def test_a_partition_is_recovered_like_a_lost_creditor(start: Any, line: Any, make_config: MakeConfig) -> None:
    # Given a request with rBlocks at the far end of a line, and another creditor with room for them
    prompt = random_prompt(150)
    many = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    with LLM(make_config("enough", num_rblocks=64)) as enough:
        (expected,) = enough.generate([prompt], many)
    a = start("a", network=network(), lending={"deadline_s": 1.0})
    cable, far = line()
    b = start("b", network=far)
    request = Request("long", prompt, many)
    a.instance.add(request)
    while len(request.output_token_ids) < 4:
        a.instance.step()
    held = a.instance.rmanager.table(request).remote_by_creditor()
    assert list(held) == ["b"]
    start("c", network=network())

    # When everything that is sent there is dropped from now on
    cable.cut()
    while not a.instance.scheduler.is_idle:
        a.instance.step()

    # Then what lay there is computed again, and no more; and b, cut off, still has an account in order
    assert request.output_token_ids == expected.token_ids
    assert 0 < request.num_recomputed_tokens <= held["b"] * 8 + 48
    assert request.num_preemptions == 0
    b.instance.check_integrity()
