"""Who may join a pool: only members whose rBlocks look alike could compute over each other's."""

import os
import signal
import threading
from contextlib import nullcontext
from typing import Any

import msgspec
import pytest

from megatron_distkv.config.instance import InstanceConfig, LedgerConfig
from megatron_distkv.engine import membership
from megatron_distkv.engine.llm import LLM
from megatron_distkv.engine.membership import Membership
from megatron_distkv.errors import UserError
from megatron_distkv.kvcache.rblock_allocator import RBlockAllocator
from megatron_distkv.kvcache.rblock_shape import RBlockShape
from megatron_distkv.ledger import MemoryLedger
from megatron_distkv.ledger.embedded_server import EmbeddedServer
from megatron_distkv.ledger.redis_ledger import RedisLedger
from megatron_distkv.rblock import InstanceId
from megatron_distkv.request import Request
from megatron_distkv.rmanager import Identity
from megatron_distkv.sampling_params import SamplingParams
from tests.conftest import MakeConfig


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
        assert [record.instance for record in a.instance._ledger.snapshot().instances] == ["a"]


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_of_two_shapes_that_join_at_the_same_moment_one_is_refused(order: str) -> None:
    # Given two members with rBlocks of different sizes that have both looked at the pool and found nobody
    ledger, shape = MemoryLedger(), RBlockShape(2, 4, 2, 8, 8, "fp32", 1)
    members = {
        name: Membership(
            ledger, Identity(InstanceId(name)), LedgerConfig(), "", RBlockAllocator(4, 4),
            msgspec.structs.replace(shape, rblock_size=size), {},
        )
        for name, size in (("a", 8), ("b", 16))
    }  # fmt: skip
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
        shape, allocator = RBlockShape(2, 4, 2, 8, 8, "fp32", 1), RBlockAllocator(4, 4)
        with nullcontext() if comes_back else pytest.raises(UserError, match="a cannot join pool 'silent': changes"):
            Membership(ledger, Identity(InstanceId("a")), LedgerConfig(pool="silent"), "", allocator, shape, {}).join()
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
            beat = b.instance._heartbeat.beat
            b.instance._heartbeat.beat = lambda: (reports.append(None), beat())  # type: ignore[method-assign,assign]
            while request.finish_reason is None:
                a.instance.step()
            # Then it lends before it has reported three times
            assert len(reports) <= 2
            assert request.max_borrowed_rblocks["b"] > 0
