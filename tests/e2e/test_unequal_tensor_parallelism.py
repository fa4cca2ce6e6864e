"""An instance of two ranks and one of one rank, over TLS and nothing else, and a lender: each borrows of the others."""

from pathlib import Path

from megatron_distkv.ledger.embedded_server import EmbeddedServer
from megatron_distkv.ledger.opening import open_ledger
from tests.e2e.conftest import OWN_TOKENS, Reference
from tests.e2e.members import Members
from tests.e2e.test_api import random_prompt
from tests.transport.test_across_hosts import network
from tests.transport.ways import free_port


def test_both_directions_give_the_same_tokens(
    byte_llama: Path, reference: Reference, server: EmbeddedServer, tmp_path: Path
) -> None:
    with Members(byte_llama, tmp_path, server.url) as members:
        # Given instances of two ranks and of one
        port = free_port(2)
        two_ranks = network(is_tls=True, listen=f"tcp://127.0.0.1:{port}")
        members.start_instance("two", launcher="deepspeed", tensor_parallel=2, network=two_ranks)
        members.start_instance("one", network=network(is_tls=True))
        members.wait()

        # When each gets a prompt that it cannot hold alone, then the tokens are right, with memory of the other
        for debtor, creditor in (("two", "one"), ("one", "two")):
            prompt = random_prompt(int(1.5 * OWN_TOKENS), seed=len(debtor))
            said = members.ask(debtor, prompt, 12).rest()
            assert said.token_ids == reference(prompt, 12)
            assert said.kv.max_borrowed_rblocks[creditor] > 0
            assert said.kv.num_recomputed_tokens == 0

        # And when a lender joins, it serves the ranks of both in turn
        members.start_lender("lender", 40, network=network(is_tls=True))
        members.wait()
        for debtor in ("two", "one"):
            prompt = random_prompt(3 * OWN_TOKENS, seed=7)
            said = members.ask(debtor, prompt, 6).rest()
            assert said.token_ids == reference(prompt, 6)
            assert said.kv.max_borrowed_rblocks["lender"] > 0
            assert said.kv.num_recomputed_tokens == 0

        # And nothing is owed in the end
        ledger = open_ledger(server.url, "default")
        assert ledger.snapshot().loans == ()
        ledger.close()
