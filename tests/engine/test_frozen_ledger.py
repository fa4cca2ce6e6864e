"""A ledger that hangs: no step of any instance waits for it."""

import os
import signal
import time

from megatron_distkv.engine.llm import LLM
from megatron_distkv.ledger.embedded_server import EmbeddedServer
from megatron_distkv.request import Request
from megatron_distkv.sampling_params import SamplingParams
from tests.conftest import MakeConfig
from tests.rmanager.test_borrowing import random_prompt
from tests.soon import wait_until

MANY = SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)
FROZEN_S = 3.0
# A call to a silent server takes a second before it gives up; a step takes some milliseconds.
A_WAIT_S = 0.7


def test_steps_go_on_while_the_ledger_hangs(make_config: MakeConfig, server: EmbeddedServer) -> None:
    with LLM(make_config("a", num_rblocks=16, url=server.url)) as a, LLM(make_config("b", url=server.url)):
        wait_until(lambda: a.instance.rmanager.longest_context_tokens() > 400)
        # Given a request that has borrowed and will grow past what it has, and one that needs nothing of anybody
        growing, still = Request("growing", random_prompt(140), MANY), Request("still", [5] * 8, MANY)
        a.instance.add(growing)
        a.instance.add(still)
        while not growing.output_token_ids or not a.instance.status(0).borrowed_rblocks:
            a.instance.step()
        # When the ledger stands still
        os.kill(server.pid, signal.SIGSTOP)
        try:
            num_before, slowest_s, end_s = len(still.output_token_ids), 0.0, time.monotonic() + FROZEN_S
            while time.monotonic() < end_s and still.finish_reason is None:
                began_s = time.monotonic()
                a.instance.step()
                slowest_s = max(slowest_s, time.monotonic() - began_s)
        finally:
            os.kill(server.pid, signal.SIGCONT)
        # Then no step waited for it, and tokens came as long as there was memory here
        assert slowest_s < A_WAIT_S
        assert len(still.output_token_ids) > num_before + 5
        # And afterwards all end
        while not a.instance.scheduler.is_idle:
            a.instance.step()
        assert len(growing.output_token_ids) == MANY.max_tokens


def test_a_request_that_ends_while_the_ledger_hangs_waits_for_nobody(
    make_config: MakeConfig, server: EmbeddedServer
) -> None:
    with LLM(make_config("a", num_rblocks=16, url=server.url)) as a, LLM(make_config("b", url=server.url)) as b:
        wait_until(lambda: a.instance.rmanager.longest_context_tokens() > 400)
        request = Request("long", random_prompt(200), MANY)
        a.instance.add(request)
        while not request.output_token_ids or not a.instance.status(0).borrowed_rblocks:
            a.instance.step()
        # When it is aborted while the ledger stands still
        os.kill(server.pid, signal.SIGSTOP)
        try:
            began_s = time.monotonic()
            a.instance.abort("long")
            a.instance.step()
            assert time.monotonic() - began_s < A_WAIT_S
        finally:
            os.kill(server.pid, signal.SIGCONT)
        # Then its loans end all the same
        wait_until(lambda: a.instance.parts.ledger.snapshot().loans == ())
        wait_until(lambda: b.instance.status(0).lent_rblocks == 0)
