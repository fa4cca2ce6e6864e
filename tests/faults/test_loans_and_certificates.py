"""A loan taken over TLS is used with the certificate that it was taken with: to know its id is not enough."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from megatron_distkv.config.lender import LenderConfig
from megatron_distkv.engine.lender import Lender
from megatron_distkv.ledger import DebtLedger
from megatron_distkv.ledger.embedded_server import EmbeddedServer
from megatron_distkv.ledger.opening import open_ledger
from megatron_distkv.messages import Refusal
from megatron_distkv.rblock import new_loan_id
from megatron_distkv.transport import Tls, load_tls
from tests.faults.visitor import Visitor, Way, borrow, join
from tests.ledger.tls_server import make_authority, make_certificate
from tests.pool.members import SHAPE
from tests.transport.ways import free_port

REFUSED = (Refusal.UNKNOWN_LOAN, b"")


def tls_of(certificate: Path, authority: Path) -> Tls:
    return load_tls(certificate, certificate.with_suffix(".key"), authority)


@pytest.fixture
def hosts(tmp_path: Path, server: EmbeddedServer) -> Iterator[tuple[DebtLedger, Way, Way]]:
    """A lender, and the ways to it of two hosts that have certificates of the same authority."""
    authority = make_authority(tmp_path, "pool")
    lenders, one, two = (make_certificate(tmp_path, authority, name) for name in ("lenders", "one", "two"))
    config = LenderConfig.model_validate(
        {
            "lender_id": "lender", "run_dir": tmp_path, "num_rblocks": 4,
            "ledger": {"url": server.url, "heartbeat_interval_s": 0.1, "lease_s": 60.0},
            "network": {
                "listen": f"tcp://127.0.0.1:{free_port()}", "advertised_host": "localhost", "shared_memory": False,
                "certificate_file": lenders, "key_file": lenders.with_suffix(".key"), "authority_file": authority,
            },
        }
    )  # fmt: skip
    with ExitStack() as stack:
        stack.callback(Lender(config, SHAPE, open_ledger(server.url, "default")).close)
        ledger = open_ledger(server.url, "default")
        stack.callback(ledger.close)
        (address,) = (x.address for x in ledger.snapshot().instances)
        yield ledger, *(Way(address, SHAPE, tls=tls_of(file, authority)) for file in (one, two))


def test_who_shows_another_certificate_is_not_the_debtor(hosts: tuple[DebtLedger, Way, Way]) -> None:
    ledger, way, others_way = hosts
    epoch = join(ledger, "debtor")
    with (
        Visitor(way, "debtor", epoch) as debtor,
        Visitor(way, "debtor", epoch) as rank_of_the_same_host,
        Visitor(others_way, "debtor", epoch) as thief,
    ):
        # Given a loan, and somebody on another host who has come to know all of it
        loan_id, block_ids = borrow(ledger, debtor, "lender", 2)
        data = debtor.kv(2)
        assert debtor.store(loan_id, block_ids, data) is None

        # When he uses it in the debtor's name, then in vain
        assert thief.fetch(loan_id, block_ids) == REFUSED
        assert thief.query([loan_id], block_ids) == REFUSED
        assert thief.store(loan_id, block_ids, thief.kv(2, seed=1)) is Refusal.UNKNOWN_LOAN
        assert thief.release(loan_id) is Refusal.UNKNOWN_LOAN
        assert thief.lend(loan_id, 2).refusal is Refusal.CONFLICT

        # Then it is as it was, for every channel of the debtor's host
        for mine in (debtor, rank_of_the_same_host):
            assert mine.fetch(loan_id, block_ids) == (None, bytes(data.numpy().data))
            assert mine.query([loan_id], block_ids)[0] is None
        assert debtor.release(loan_id) is None


def test_an_heir_brings_its_own_certificate(hosts: tuple[DebtLedger, Way, Way]) -> None:
    ledger, way, others_way = hosts
    with (
        Visitor(way, "debtor", join(ledger, "debtor")) as debtor,
        Visitor(others_way, "heir", join(ledger, "heir")) as heir,
    ):
        # Given a loan whose id its debtor has told an heir on another host
        loan_id, block_ids = borrow(ledger, debtor, "lender", 2)
        data = debtor.kv(2)
        assert debtor.store(loan_id, block_ids, data) is None

        # When that takes it over, then it is its own, and the heir's certificate is asked for
        new_id = new_loan_id("heir", heir.epoch, 1)
        assert heir.inherit(loan_id, new_id).block_ids == block_ids
        assert heir.fetch(new_id, block_ids) == (None, bytes(data.numpy().data))
        with Visitor(way, "heir", heir.epoch) as thief:
            assert thief.fetch(new_id, block_ids) == REFUSED
        assert heir.release(new_id) is None
