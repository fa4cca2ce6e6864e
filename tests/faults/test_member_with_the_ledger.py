"""A member that knows the secret of the pool and reads its ledger can neither read nor change KV of another."""

import logging
import re
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import redis
from prometheus_client import generate_latest

from megatron_distkv.cli.main import main
from megatron_distkv.engine.llm import LLM
from megatron_distkv.ledger import DebtLedger
from megatron_distkv.ledger.embedded_server import EmbeddedServer
from megatron_distkv.ledger.opening import open_ledger
from megatron_distkv.messages import Refusal
from megatron_distkv.metrics import INSTANCE_REGISTRY, REGISTRY
from megatron_distkv.pool import HeldLoan, RequestOwner, picture_of, render_debts
from megatron_distkv.rblock import loan_name
from megatron_distkv.request import Request
from megatron_distkv.sampling_params import SamplingParams
from megatron_distkv.transport import read_secret, write_new_secret
from tests.conftest import MakeConfig
from tests.faults.visitor import Visitor, Way, borrow, join
from tests.soon import wait_until

GREEDY = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
PROMPT = [3 + i % 100 for i in range(150)]  # 19 rBlocks, of which the instance holds 16
REFUSED = (Refusal.UNKNOWN_LOAN, b"")


class Victim(NamedTuple):
    """`llm` is in the middle of a request, with rBlocks at `creditor`."""

    llm: LLM
    creditor: LLM
    request: Request
    loans: list[HeldLoan]
    ledger: DebtLedger
    url: str
    way: Way

    def finish(self) -> list[int]:
        while not self.llm.instance.scheduler.is_idle:
            self.llm.instance.step()
        return self.request.output_token_ids


@pytest.fixture
def victim(make_config: MakeConfig, server: EmbeddedServer, caplog: pytest.LogCaptureFixture) -> Iterator[Victim]:
    caplog.set_level(logging.DEBUG, "distkv")
    run_dir = make_config().run_dir
    write_new_secret(run_dir / "secret")
    rooms = {
        "ledger": {"url": server.url, "heartbeat_interval_s": 0.1, "lease_s": 60.0, "secret_file": run_dir / "secret"},
        "scheduler": {"max_batched_tokens": 48},
    }
    ledger = open_ledger(server.url, "default")
    with (
        LLM(make_config("b", num_rblocks=64, **rooms)) as creditor,
        LLM(make_config("a", num_rblocks=16, **rooms)) as llm,
    ):
        request = Request("long", PROMPT, GREEDY)
        llm.instance.add(request)
        while len(request.output_token_ids) < 3:
            llm.instance.step()
        loans = llm.instance.parts.loans.of(RequestOwner("long"))
        way = Way(loans[0].peer.address, creditor.instance.parts.rank.shape, read_secret(run_dir / "secret"))
        yield Victim(llm, creditor, request, list(loans), ledger, server.url, way)
        creditor.instance.check_integrity()
    ledger.close()


def all_of(url: str) -> str:
    """Every key that the server holds, with all that is in it."""
    client = redis.Redis.from_url(url, decode_responses=True)
    read = {
        "string": client.get, "hash": client.hgetall, "set": client.smembers, "stream": client.xrange,
        "list": lambda key: client.lrange(key, 0, -1), "zset": lambda key: client.zrange(key, 0, -1, withscores=True),
    }  # fmt: skip
    found = [(key, read[str(client.type(key))](key)) for key in client.scan_iter("*")]
    client.close()
    return repr(found)


def everything_that_is_shown(victim: Victim, capsys: pytest.CaptureFixture[str]) -> str:
    ledger, snapshot = victim.ledger, victim.ledger.snapshot()
    main(["ledger", "--ledger", victim.url])
    main(["ledger", "--ledger", victim.url, "--history"])
    shown = [
        all_of(victim.url), capsys.readouterr().out, repr(snapshot), repr(ledger.changes(0)),
        repr(ledger.events(1000)), render_debts(picture_of(snapshot)), repr(victim.loans),
        *(repr(llm.instance.status(0)) for llm in (victim.llm, victim.creditor)),
        *(generate_latest(registry).decode() for registry in (REGISTRY, INSTANCE_REGISTRY)),
    ]  # fmt: skip
    return "\n".join(shown)


def secret_of(loan_id: str) -> str:
    return loan_id.rpartition(".")[2]


def test_what_is_shown_does_not_open_anothers_memory(
    victim: Victim, capsys: pytest.CaptureFixture[str], make_config: MakeConfig
) -> None:
    # Given all that a member can read while another's request has rBlocks at a creditor
    shown = everything_that_is_shown(victim, capsys)
    names = {loan_name(loan.loan_id) for loan in victim.loans}
    words = {word for word in re.findall(r"[\w.-]+", shown) if any(word.startswith(name) for name in names)}
    assert words > names  # the loans are there, by their keys
    spans = victim.llm.instance.rmanager.table(victim.request).remote_spans()
    theirs = [block_id for span in spans for block_id in span.block_ids]
    assert theirs
    epoch = victim.llm.instance.parts.rank.identity.epoch

    # When it tries every word of it as a loan's id, in its own name and in the debtor's, with every message
    for name, its_epoch in (("visitor", join(victim.ledger, "visitor")), ("a", epoch)):
        with Visitor(victim.way, name, its_epoch) as thief:
            for word in words:
                assert thief.fetch(word, theirs[:1]) == REFUSED
                assert thief.query([word], theirs[:1]) == REFUSED
                assert thief.store(word, theirs[:1], thief.kv(1)) is Refusal.UNKNOWN_LOAN
                assert thief.inherit(word, f"{word}.mine").refusal is Refusal.UNKNOWN_LOAN
                assert thief.commit(word, {0: theirs[0]}) is Refusal.UNKNOWN_LOAN
                assert thief.lend(word, len(theirs)).refusal is not None
                thief.release(word)  # of an unknown loan: it ended before, for all that the creditor says
            for step in range(60):
                assert thief.later_layer(step) == REFUSED

    # Then nothing was read, and the debtor's tokens are right
    tokens = victim.finish()
    assert victim.request.num_recomputed_tokens == 0
    with LLM(make_config("enough")) as enough:
        assert tokens == enough.generate([PROMPT], GREEDY)[0].token_ids


def test_no_log_line_and_no_count_has_an_id(
    victim: Victim, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    # Given all that is shown and logged, at every level, from a loan's begin to its end
    secrets = {secret_of(loan.loan_id) for loan in victim.loans}
    shown = everything_that_is_shown(victim, capsys)
    victim.finish()
    logged = "\n".join(record.getMessage() for record in caplog.records)
    # Then the secret part of no loan's id is in it
    assert all(len(secret) == 32 for secret in secrets)
    assert not [secret for secret in secrets if secret in shown or secret in logged]


def test_a_loan_of_ones_own_shows_nothing_of_requests_that_have_ended(victim: Victim) -> None:
    # Given a creditor that held another's KV
    spans = victim.llm.instance.rmanager.table(victim.request).remote_spans()
    theirs = {block_id for span in spans for block_id in span.block_ids}
    victim.finish()
    wait_until(lambda: victim.creditor.instance.status(0).lent_rblocks == 0)
    # When a member borrows that memory for itself
    with Visitor(victim.way, "visitor", join(victim.ledger, "visitor")) as visitor:
        loan_id, block_ids = borrow(victim.ledger, visitor, "b", 50)
        assert theirs & set(block_ids)
        # Then it reads nothing of what lies there
        for block_id in block_ids:
            assert visitor.fetch(loan_id, [block_id]) == REFUSED
        visitor.release(loan_id)
