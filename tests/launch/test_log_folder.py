"""Logs of a part's lives, side by side."""

import os
import signal
import time
from pathlib import Path

import pytest
from megatron_distkv.launch.log_folder import NUM_FIRST_KEPT, NUM_LAST_KEPT, LogFolder

from megatron_distkv.errors import UserError
from megatron_distkv.ledger.embedded_server import EmbeddedServer


def test_each_life_has_a_log_of_its_own_and_their_number_is_bounded(tmp_path: Path) -> None:
    logs = LogFolder(tmp_path / "new" / "folder")
    num_lives = NUM_FIRST_KEPT + NUM_LAST_KEPT + 31
    for life in range(num_lives):
        log = logs.new_log("instance-0")
        assert not log.exists()
        log.write_text(str(life))
    # Then the first lives and the last ones are there, and the one that runs
    kept = {int(path.read_text()) for path in logs.path.glob("instance-0*.log")}
    last = range(num_lives - 1 - NUM_LAST_KEPT, num_lives)
    assert kept == {*range(NUM_FIRST_KEPT), *last}


def test_another_part_with_the_same_beginning_is_left_alone(tmp_path: Path) -> None:
    logs = LogFolder(tmp_path)
    for name in ("lender-1", "lender-10", "lender-1", "lender-10"):
        logs.new_log(name).touch()
    assert sorted(path.name for path in tmp_path.glob("*.log")) == [
        "lender-1.0.log", "lender-1.log", "lender-10.0.log", "lender-10.log",
    ]  # fmt: skip


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write logs into .*; choose another --log-dir"):
        LogFolder(tmp_path / "file")


def test_a_ledger_server_that_is_started_again_begins_another_log(tmp_path: Path) -> None:
    logs = LogFolder(tmp_path)
    with EmbeddedServer(log=logs.new_log("ledger")) as server:
        # Given one that is killed
        assert server.exit_status is None
        os.kill(server.pid, signal.SIGKILL)
        end_s = time.monotonic() + 30
        while server.exit_status is None:
            assert time.monotonic() < end_s
            time.sleep(0.01)
        assert server.exit_status == -signal.SIGKILL
        # When it is started again, then it runs, and both lives have their logs
        logs.new_log("ledger")
        server.start()
        assert server.exit_status is None
    for name in ("ledger.0.log", "ledger.log"):
        assert "Ready to accept connections" in (tmp_path / name).read_text()
