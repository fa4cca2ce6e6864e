"""A loan's id opens its memory: logs show all but its unguessable end."""

import logging

import pytest

from megatron_distkv.engine.llm import LLM
from megatron_distkv.ledger.embedded_server import EmbeddedServer
from megatron_distkv.pool import RequestOwner
from megatron_distkv.rblock import LoanId, loan_key, loan_name
from megatron_distkv.request import Request
from megatron_distkv.sampling_params import SamplingParams
from tests.conftest import MakeConfig


def test_no_log_tells_a_loans_unguessable_end(
    make_config: MakeConfig, server: EmbeddedServer, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        LLM(make_config("a", num_rblocks=16, url=server.url)) as a,
        LLM(make_config("b", url=server.url)) as b,
        caplog.at_level(logging.DEBUG),
    ):
        # Given a loan that its creditor and the ledger end behind the debtor's back
        request = Request("long", [3 + i % 100 for i in range(150)], SamplingParams(max_tokens=8, ignore_eos=True))
        a.instance.add(request)
        while not request.output_token_ids:
            a.instance.step()
        loan_id = LoanId(a.instance.parts.loans.of(RequestOwner("long"))[0].loan_id)
        me = a.instance.parts.rank.identity
        a.instance.parts.ledger.release(loan_key(loan_id), me.instance, me.epoch)
        b.instance.parts.lending.reconcile(1)
        # When the debtor hears of it
        while not a.instance.scheduler.is_idle:
            a.instance.step()
    # Then the loan is named, and nobody could use what is said of it
    said = " ".join(record.getMessage() for record in caplog.records)
    assert loan_name(loan_id) in said
    assert loan_id not in said
