"""Instance and lender on two "hosts": the same tokens over a bad line, and a partition costs what lay behind it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_distkv.ledger.embedded_server import EmbeddedServer
from tests.e2e.conftest import Reference
from tests.e2e.members import Members
from tests.e2e.network_namespaces import NotHere, TwoHosts
from tests.e2e.test_api import random_prompt

PORT = 7300
# One step may be moving so many rBlocks to the far host when the cable is cut.
MAX_MOVED = 4


@pytest.fixture
def hosts() -> Iterator[TwoHosts]:
    try:
        two = TwoHosts()
    except NotHere as why:
        pytest.skip(f"no network namespaces here: {why}")
    with two:
        yield two


def test_a_bad_line_and_a_partition(
    hosts: TwoHosts, byte_llama: Path, reference: Reference, server: EmbeddedServer, tmp_path: Path
) -> None:
    # Given an instance and a lender on one host, and a larger lender on another
    def network(number: int, port: int) -> dict[str, object]:
        return {"listen": f"tcp://{hosts.addresses[number]}:{port}", "shared_memory": False}

    try:
        hosts.degrade(delay_ms=2, loss_percent=0.5)
    except NotHere as why:
        print(f"without delay and loss: {why}")
    with Members(byte_llama, tmp_path, server.url) as members:
        lending = {"deadline_s": 2.0, "max_moved_rblocks_per_step": MAX_MOVED}
        members.start_instance("a", within=hosts.within(0), network=network(0, PORT), lending=lending)
        members.start_lender("near", 40, within=hosts.within(0), network=network(0, PORT + 1))
        members.start_lender("far", 60, within=hosts.within(1), network=network(1, PORT))
        members.wait()

        # When a prompt needs the other host's memory, then its tokens are right
        prompt = random_prompt(150, seed=4)
        said = members.ask("a", prompt, 10).rest()
        assert said.token_ids == reference(prompt, 10)
        assert said.kv.max_borrowed_rblocks["far"] > 0

        # And when the cable is cut in the middle of a request
        conversation = members.ask("a", prompt, 100)
        conversation.next()
        hosts.cut()
        said = conversation.rest()

        # Then what lay behind it, and what was on its way there in that step, is computed again, and no more
        assert said.token_ids == reference(prompt, 100)
        assert 0 < said.kv.num_recomputed_tokens <= (said.kv.max_borrowed_rblocks["far"] + MAX_MOVED) * 8 < 150
        assert said.kv.num_preemptions == 0
