"""A server whose clock is put right: the living stay alive, and the dead still die."""

from typing import Any

import pytest

from megatron_distkv.ledger import InstanceReport, InstanceState, MemoryLedger
from megatron_distkv.ledger.embedded_server import EmbeddedServer
from megatron_distkv.ledger.redis_ledger import RedisLedger
from megatron_distkv.rblock import InstanceId, LoanId

A, B = InstanceId("a"), InstanceId("b")
LEASE_S = 10.0
REPORT = InstanceReport(0, InstanceState.UP, 0, 0, 0, ())


@pytest.mark.parametrize("kind", ["memory", "redis"])
@pytest.mark.parametrize("jump_ms", [3_600_000, -3_600_000])
def test_a_jump_ends_no_lease_and_keeps_none(kind: str, jump_ms: int, server: EmbeddedServer) -> None:
    # Given b, which lends to a
    now_ms = [1_763_700_000_000]
    clock: Any = {"clock_ms": lambda: now_ms[0]}
    ledger: Any = MemoryLedger(**clock) if kind == "memory" else RedisLedger(server.url, f"jump{jump_ms}", **clock)
    a, b = (ledger.register(name, name, 10, 1, LEASE_S).epoch for name in (A, B))
    assert ledger.borrow(LoanId("1"), A, a, B, b, 4, 3.0) is None
    assert ledger.accept(LoanId("1"), B, b) is None

    # When the clock jumps, then both still live, and so does the loan, also a while later
    now_ms[0] += jump_ms
    for passed_ms in (0, 4_000):
        now_ms[0] += passed_ms
        assert ledger.heartbeat(A, a, REPORT, LEASE_S).known
        assert {record.instance for record in ledger.snapshot().live} == {A, B}
        assert [loan.key for loan in ledger.snapshot().loans] == ["1"]

    # And b, which has said nothing since, is dead when its lease is over, and its loan void
    for passed_ms in (4_000, 4_000):
        now_ms[0] += passed_ms
        assert ledger.heartbeat(A, a, REPORT, LEASE_S).known
    assert [record.instance for record in ledger.snapshot().instances] == [A]
    assert ledger.snapshot().loans == ()
