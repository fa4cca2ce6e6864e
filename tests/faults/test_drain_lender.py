"""`distkv drain` is for instances; a lender ends otherwise, and whoever asks is told how."""

import pytest

from megatron_distkv.cli.main import main
from megatron_distkv.ledger.embedded_server import EmbeddedServer
from megatron_distkv.ledger.opening import open_ledger
from megatron_distkv.rblock import InstanceId
from tests.pool.members import info


def test_draining_a_lender_is_one_sentence_that_says_what_works(
    server: EmbeddedServer, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = open_ledger(server.url, "default")
    ledger.register(InstanceId("l"), "unix:x", 8, 0, 600.0, info=info(role="lender"))
    ledger.close()
    assert main(["drain", "l", "--ledger", server.url]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "l is a memory-only lender and serves no requests: send its process SIGTERM" in said
