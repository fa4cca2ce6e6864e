"""When a dead part is started again, and what is said of it, in a time of the test's own."""

import pytest
from megatron_distkv.launch.supervisor import LONGEST_PAUSE_S, SOUND_AFTER_S, Ended, Supervisor

KILLED = Ended(-9, "killed by SIGKILL")
BROKEN = Ended(2, "no checkpoint at /nowhere")


class Pool:
    """Its parts end and start as a test says, at `now_s`."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.supervisor = Supervisor(["gateway", "instance-0"], self.said.append, start_timeout_s=180)
        self.now_s = 1000.0

    def end(self, name: str, ended: Ended) -> None:
        self.supervisor.note_ended(name, ended, self.now_s)

    def pass_until_due(self, name: str) -> float:
        """Starts it then; returns the pause."""
        began_s = self.now_s
        while name not in self.supervisor.due(self.now_s):
            assert self.now_s - began_s < 10 * LONGEST_PAUSE_S
            self.now_s += 0.5
        self.supervisor.note_started(name, self.now_s)
        return self.now_s - began_s


@pytest.fixture
def pool() -> Pool:
    return Pool()


def test_a_part_that_dies_is_started_again_and_both_is_said(pool: Pool) -> None:
    # Given a gateway that is killed
    assert not pool.supervisor.has_seen_failure
    pool.end("gateway", KILLED)
    assert pool.said == ["gateway ended (exit status -9): killed by SIGKILL; starting it again in 2 s"]
    # Then it is started once, after that pause
    assert pool.pass_until_due("gateway") == 2.0
    assert pool.supervisor.due(pool.now_s + 1000) == []
    # And when it serves, that is said, and it stays a pool in which something failed
    pool.supervisor.note_ready("gateway", pool.now_s)
    assert pool.said[1:] == ["gateway serves again"]
    assert pool.supervisor.has_seen_failure


def test_a_part_that_keeps_failing_is_tried_at_a_bounded_pace_and_said_once(pool: Pool) -> None:
    # Given one that never starts
    pauses = []
    for _ in range(100):
        pool.end("instance-0", BROKEN)
        pauses.append(pool.pass_until_due("instance-0"))
    # Then the pauses grow up to a bound
    assert pauses[:6] == [2, 4, 8, 16, 32, 60]
    assert set(pauses[6:]) == {LONGEST_PAUSE_S}
    # And it is said at first, and that it goes on
    assert len(pool.said) == 2
    assert pool.said[1].startswith(
        "instance-0 ended again (exit status 2): no checkpoint at /nowhere; it is tried again"
    )
    # And another cause is news
    pool.end("instance-0", KILLED)
    assert len(pool.said) == 3


def test_a_part_that_dies_soon_after_each_start_is_not_news_every_time(pool: Pool) -> None:
    for _ in range(20):
        pool.end("gateway", KILLED)
        pool.pass_until_due("gateway")
        pool.supervisor.note_ready("gateway", pool.now_s)
        pool.now_s += 1
    assert [line.split("(")[0].strip() for line in pool.said] == [
        "gateway ended", "gateway serves again", "gateway ended again",
    ]  # fmt: skip
    # And once it holds, that is said, and its next end is a first one
    pool.now_s += SOUND_AFTER_S
    assert pool.supervisor.due(pool.now_s) == []
    assert pool.said[-1] == "gateway serves again"
    pool.end("gateway", KILLED)
    assert pool.said[-1].endswith("starting it again in 2 s")


def test_who_left_in_order_or_was_replaced_stays_away(pool: Pool) -> None:
    pool.end("instance-0", Ended(0, "", is_in_order=True))
    assert pool.said == ["instance-0 has left the pool in order; it is not started again"]
    assert not pool.supervisor.has_seen_failure
    pool.end("gateway", Ended(3, "a later one is there", is_replaced=True))
    assert pool.said[1] == "gateway ended (exit status 3): a later one is there; it is not started again"
    # However long it takes
    assert pool.supervisor.due(pool.now_s + 1e6) == []
    assert not pool.supervisor.may_end("instance-0")


def test_a_start_that_takes_too_long_is_overdue(pool: Pool) -> None:
    pool.end("instance-0", KILLED)
    pool.pass_until_due("instance-0")
    assert pool.supervisor.starting() == ["instance-0"]
    assert pool.supervisor.overdue(pool.now_s + 179) == []
    assert pool.supervisor.overdue(pool.now_s + 181) == ["instance-0"]


def test_parts_do_not_share_their_pauses(pool: Pool) -> None:
    pool.end("gateway", KILLED)
    pool.now_s += 1
    pool.end("instance-0", KILLED)
    assert pool.supervisor.due(pool.now_s + 1) == ["gateway"]
