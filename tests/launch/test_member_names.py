"""A new pool on a ledger where its names are taken: refused by the living, after a while let in by the dead."""

import threading

import pytest
from megatron_distkv.launch.member_names import require_free_names

from megatron_distkv.errors import UserError
from megatron_distkv.ledger import InstanceReport
from megatron_distkv.ledger.embedded_server import EmbeddedServer
from megatron_distkv.ledger.opening import open_ledger
from megatron_distkv.rblock import InstanceId

NAME = InstanceId("instance-0")


def test_a_name_that_nobody_has_is_free(server: EmbeddedServer) -> None:
    ledger = open_ledger(server.url, "default")
    said: list[str] = []
    require_free_names(ledger, [NAME], "pool 'default'", said.append, threading.Event())
    # And so is one that somebody has in another pool of the same ledger
    open_ledger(server.url, "other").register(NAME, "unix:x", 16, 2, 60.0)
    require_free_names(ledger, [NAME], "pool 'default'", said.append, threading.Event())
    assert said == []


def test_a_name_that_lives_is_taken(server: EmbeddedServer) -> None:
    # Given a member that renews its lease
    ledger, stop = open_ledger(server.url, "default"), threading.Event()
    epoch = ledger.register(NAME, "unix:x", 16, 2, 60.0).epoch

    def live() -> None:
        while not stop.wait(0.2):
            open_ledger(server.url, "default").heartbeat(NAME, epoch, InstanceReport(0), 60.0)

    thread = threading.Thread(target=live)
    thread.start()
    # When another pool wants its name, then it is refused within less than the lease, and the member lives on
    with pytest.raises(UserError, match=r"pool 'default' has live members called instance-0 already.*--pool"):
        require_free_names(ledger, [NAME, InstanceId("instance-1")], "pool 'default'", print, threading.Event())
    stop.set()
    thread.join()
    assert [record.epoch for record in ledger.snapshot().live] == [epoch]


def test_a_name_of_the_dead_is_free_when_its_lease_has_ended(server: EmbeddedServer) -> None:
    ledger = open_ledger(server.url, "default")
    ledger.register(NAME, "unix:x", 16, 2, 3.0)
    said: list[str] = []
    require_free_names(ledger, [NAME], "pool 'default'", said.append, threading.Event())
    assert ledger.snapshot().live == ()
    assert said == ["waiting for instance-0 in pool 'default': alive, or killed less than a lease ago"]


def test_who_is_told_to_stop_waits_no_longer(server: EmbeddedServer) -> None:
    ledger, stop = open_ledger(server.url, "default"), threading.Event()
    ledger.register(NAME, "unix:x", 16, 2, 600.0)
    stop.set()
    require_free_names(ledger, [NAME], "pool 'default'", print, stop)
    assert [member.instance for member in ledger.snapshot().live] == [NAME]
