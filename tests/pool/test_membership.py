"""Who may join a pool: only members whose rBlocks look alike could compute over each other's."""

import os
import signal
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import msgspec
import pytest

from megatron_distkv.clock import SystemClock
from megatron_distkv.config.instance import InstanceConfig, LedgerConfig
from megatron_distkv.engine.llm import LLM
from megatron_distkv.errors import UserError
from megatron_distkv.kvcache.rblock_shape import RBlockShape
from megatron_distkv.ledger import DebtLedger, HeartbeatReply, InstanceReport, MemoryLedger
from megatron_distkv.ledger.embedded_server import EmbeddedServer
from megatron_distkv.ledger.redis_ledger import RedisLedger
from megatron_distkv.messages import Counted
from megatron_distkv.pool import Identity, MemberInfo, Membership, membership
from megatron_distkv.rblock import InstanceId
from megatron_distkv.request import Request
from megatron_distkv.sampling_params import SamplingParams
from tests.conftest import MakeConfig
from tests.model.llamas import save_llama
from tests.pool.members import SHAPE


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"kv_cache": {"num_rblocks": 8, "rblock_size": 16}}, "rblock_size 16, not 8 as those of a"),
        ({"dtype": "bf16"}, "dtype bf16, not fp32 as those of a"),
        (
            {"kv_cache": {"num_rblocks": 8, "rblock_size": 8, "dtype": "int8"}},
            "kv_dtype int8, not auto as those of a",
        ),
    ],
)
def test_rblocks_of_another_shape_cannot_join(
    changes: dict[str, Any], what: str, make_config: MakeConfig, server: EmbeddedServer
) -> None:
    # Given a pool with one instance
    with LLM(make_config("a", url=server.url)) as a:
        values = {**make_config("b", url=server.url).model_dump(), **changes}
        # When one with other rBlocks wants to join, then it is told why not, and the pool never hears of it
        with pytest.raises(UserError, match=f"b cannot join pool 'default': its rBlocks have {what}"):
            LLM(InstanceConfig.model_validate(values))
        assert [record.instance for record in a.instance.parts.ledger.snapshot().instances] == ["a"]


def member(name: str, ledger: DebtLedger, info: MemberInfo, pool: str = "default") -> Membership:
    return Membership(ledger, Identity(InstanceId(name)), LedgerConfig(pool=pool), "", 4, 0, info, SystemClock())


def test_other_weights_of_the_same_shape_cannot_join(
    make_config: MakeConfig, server: EmbeddedServer, tmp_path: Path
) -> None:
    # Given a pool that serves one checkpoint
    with LLM(make_config("a", url=server.url)) as a:
        # When one with the same shape and other weights wants to join, then it is told why not
        other = make_config("b", url=server.url).model_copy(update={"model": save_llama(tmp_path / "other", seed=7)})
        with pytest.raises(UserError, match=r"b cannot join .*: the weights in .*other are not those that a"):
            LLM(other)
        # And a lender, which has none, can
        assert [record.instance for record in a.instance.parts.ledger.snapshot().instances] == ["a"]
        member("lender", a.instance.parts.ledger, MemberInfo(shape=a.instance.parts.rank.shape, role="lender")).join()


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_of_two_shapes_that_join_at_the_same_moment_one_is_refused(order: str) -> None:
    # Given two members with rBlocks of different sizes that have both looked at the pool and found nobody
    ledger, shape = MemoryLedger(), RBlockShape(2, 4, 2, 8, 8, "fp32", 1)
    members = {
        name: member(name, ledger, MemberInfo(shape=msgspec.structs.replace(shape, rblock_size=size)))
        for name, size in (("a", 8), ("b", 16))
    }
    first, second = order
    # When both register, then the first stays, and the second is told why not
    members[first].join()
    with pytest.raises(UserError, match=f"{second} cannot join pool 'default'.*as those of {first}"):
        members[second].join()
    assert [record.instance for record in ledger.snapshot().instances] == [first]
    # And the first stays for good, though the ledger forgets it
    ledger.lose_everything()
    members[first].join()
    assert [record.instance for record in ledger.snapshot().instances] == [first]


class RecordingLedger(MemoryLedger):
    """Remembers what heartbeats said."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[InstanceReport] = []

    def heartbeat(self, instance: InstanceId, epoch: int, report: InstanceReport, lease_s: float) -> HeartbeatReply:
        self.said.append(report)
        return super().heartbeat(instance, epoch, report, lease_s)


def test_counts_are_told_when_they_change_and_again_to_a_ledger_that_has_lost_them() -> None:
    # Given a member that has counted something
    ledger = RecordingLedger()
    lender = member("lender", ledger, MemberInfo(shape=SHAPE, role="lender"))
    counted = (Counted("distkv_loans_made_total", {}, 1.0),)
    lender.report = lambda: InstanceReport(0, counted=counted)
    lender.join()
    # When it reports twice, then it has said so once, and the ledger keeps it without a change
    lender.beat()
    version = ledger.changes(0).version
    lender.beat()
    assert [report.counted for report in ledger.said] == [counted, None]
    assert (ledger.changes(version).members, ledger.snapshot().instances[0].counted) == ((), counted)
    # And once more where the ledger has lost its data
    ledger.lose_everything()
    lender.beat()
    lender.beat()
    assert ledger.snapshot().instances[0].counted == counted
    # And what it has counted since
    counted = (Counted("distkv_loans_made_total", {}, 2.0),)
    lender.beat()
    assert ledger.snapshot().instances[0].counted == counted


@pytest.mark.parametrize("comes_back", [True, False])
def test_who_joins_waits_for_a_ledger_that_is_silent_for_a_while(
    comes_back: bool, server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(membership, "JOIN_PATIENCE_S", 10.0 if comes_back else 0.1)
    # Given a ledger that hangs for longer than a call waits
    ledger = RedisLedger(server.url, "silent", timeout_s=0.2)
    os.kill(server.pid, signal.SIGSTOP)
    again = threading.Timer(0.5 if comes_back else 1.0, os.kill, (server.pid, signal.SIGCONT))
    again.start()
    try:
        # When a member joins, then it waits
        with nullcontext() if comes_back else pytest.raises(UserError, match="a cannot join pool 'silent': "):
            member("a", ledger, MemberInfo(shape=SHAPE), pool="silent").join()
            assert [record.instance for record in ledger.snapshot().instances] == ["a"]
    finally:
        again.join()
        ledger.close()


def test_a_new_member_is_used_within_two_of_its_reports(make_config: MakeConfig, server: EmbeddedServer) -> None:
    params = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
    with LLM(make_config("a", num_rblocks=8, url=server.url)) as a:
        # Given a request that nobody has memory for
        request = Request("waits", [5 + place % 90 for place in range(100)], params)
        a.instance.add(request)
        for _ in range(3):
            assert a.instance.step() == []
        # When one joins that has some, and reports rarely
        rarely = {"url": server.url, "heartbeat_interval_s": 2.0, "lease_s": 10.0}
        with LLM(make_config("b", ledger=rarely)) as b:
            reports: list[None] = []
            membership = b.instance.parts.membership
            report = membership.report
            membership.report = lambda: (reports.append(None), report())[1]
            while request.finish_reason is None:
                a.instance.step()
            # Then it lends before it has reported three times
            assert len(reports) <= 2
            assert request.max_borrowed_rblocks["b"] > 0
