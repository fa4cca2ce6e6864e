"""A creditor that hangs is found out soon; one that is only slow is not lost."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_distkv.attention import Deadlines, Debtor
from megatron_distkv.attention.deadlines import FACTOR, NUM_LEARNT
from megatron_distkv.attention.metadata import RemoteShare
from megatron_distkv.clock import SystemClock
from megatron_distkv.messages import QueryShare
from megatron_distkv.peers import MailboxSizes, Peers
from megatron_distkv.pool import Identity, Peer
from megatron_distkv.rblock import InstanceId

LEAST_S, MOST_S = 0.3, 30.0
# Answers at once; told to be slow, takes longer than any learnt patience.
CREDITOR = """
import sys, time, msgspec, torch
from megatron_distkv.messages import Acknowledge, QueryHeader
from megatron_distkv.transport import Answer, Listener
def answer(hello, request):
    query = msgspec.msgpack.decode(request.header, type=QueryHeader)
    if query.layer == 1:
        time.sleep(1.5)
    return Answer(msgspec.msgpack.encode(Acknowledge()), [torch.full((1, 2, 4), float(query.step)), torch.zeros(1, 2)])
listener = Listener(sys.argv[1], "p", answer)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.fixture
def creditor(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", CREDITOR, f"unix:{tmp_path}/c.0.sock"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.fixture
def peers() -> Iterator[Peers]:
    """The debtor's channels."""
    made = Peers("p", Identity(InstanceId("d"), 1), SystemClock(), 0, MailboxSizes(8192, 8192), MOST_S)
    yield made
    made.close()


@pytest.fixture
def debtor(tmp_path: Path, creditor: subprocess.Popen[str], peers: Peers) -> Debtor:
    """Has had so many answers that it knows what is usual."""
    peers.reach(at(tmp_path))
    debtor = Debtor(peers, MOST_S, SystemClock(), deadlines=Deadlines(LEAST_S, MOST_S, peers.is_alive))
    for _ in range(NUM_LEARNT):
        assert ask(debtor, 0) == 1
    return debtor


def at(tmp_path: Path) -> Peer:
    return Peer("c", 1, f"unix:{tmp_path}/c.{{rank}}.sock")


def ask(debtor: Debtor, layer: int, step: int = 1) -> int:
    """How many partials came, all of them of this step."""
    share = RemoteShare(torch.zeros(1, dtype=torch.int64), [QueryShare(["loan"], [0], 1)])
    debtor.begin_step(step, {"c": share})
    debtor.ask(layer, torch.zeros(1, 2, 4))
    answers = debtor.answers()
    assert all(float(partial.out_RHD[0, 0, 0]) == step for partial in answers)
    return len(answers)


def test_a_slow_creditor_that_lives_is_waited_for(debtor: Debtor) -> None:
    assert ask(debtor, 1) == 1
    assert debtor.waited_s > LEAST_S
    assert debtor.lost == {}


def test_a_creditor_that_hangs_is_lost_long_before_the_last_deadline(
    debtor: Debtor, peers: Peers, creditor: subprocess.Popen[str], tmp_path: Path
) -> None:
    os.kill(creditor.pid, signal.SIGSTOP)
    os.waitpid(creditor.pid, os.WUNTRACED)  # until every thread of it stands still
    assert ask(debtor, 0) == 0
    assert "no sign of life" in debtor.lost["c"]
    assert debtor.waited_s < MOST_S / 2

    # And when it goes on, and answers that late, nobody listens there any more
    os.kill(creditor.pid, signal.SIGCONT)
    assert ask(debtor, 0, step=2) == 0
    # Nor do stale answers come to who speaks to it again
    peers.give_up("c", 0.0)
    peers.reach(at(tmp_path))
    assert [ask(debtor, 0, step) for step in (3, 4, 5)] == [1, 1, 1]


def test_a_creditor_that_dies_is_lost_at_once(debtor: Debtor, creditor: subprocess.Popen[str]) -> None:
    creditor.kill()
    creditor.wait()
    began_s = time.monotonic()
    assert ask(debtor, 0) == 0
    assert "no sign of life" not in debtor.lost["c"]
    assert time.monotonic() - began_s < MOST_S / 2


def test_what_is_usual_is_learnt_and_bounded() -> None:
    deadlines = Deadlines(0.5, 10.0, lambda _peer, _within_s: True)
    for _ in range(NUM_LEARNT - 1):
        deadlines.note("c", 0.001)
    assert deadlines.doubtful_after_s("c") == 10.0  # too little is known
    deadlines.note("c", 0.001)
    assert deadlines.doubtful_after_s("c") == 0.5  # quick: the lower bound
    deadlines.note("c", 0.1)
    assert deadlines.doubtful_after_s("c") == pytest.approx(FACTOR * 0.1)  # one slow answer is remembered
    for _ in range(5000):
        deadlines.note("c", 0.001)
    assert deadlines.doubtful_after_s("c") == 0.5  # and forgotten in time
    deadlines.note("c", 3.0)
    assert deadlines.doubtful_after_s("c") == 10.0  # the upper bound
    deadlines.forget("c")
    assert deadlines.doubtful_after_s("c") == 10.0
    assert deadlines.doubtful_after_s("other") == 10.0
