"""Requests that have ended leave nothing behind, however many there were."""

import contextlib
import gc
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from megatron_distkv import framing
from megatron_distkv.config.instance import InstanceConfig
from megatron_distkv.engine.addresses import request_socket
from megatron_distkv.engine.llm import LLM
from megatron_distkv.engine.request_io import RequestIO
from megatron_distkv.engine.serving import Serving
from megatron_distkv.messages import FromInstance, InstanceStatus, NewRequest, StatusQuery, TokenOutput
from megatron_distkv.sampling_params import SamplingParams
from tests.conftest import MakeConfig

PATIENCE_S = 120.0
SHORT = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
AT_ONCE = 16
MIB = 1 << 20


class Gateway:
    """One connection; sends short requests and waits for all their ends."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(PATIENCE_S)
        end_s = time.monotonic() + PATIENCE_S
        while True:
            try:
                self._socket.connect(str(path))
                break
            except OSError:
                assert time.monotonic() < end_s
                time.sleep(0.1)
        self._file = self._socket.makefile("rb")
        self._num_sent = 0

    def serve(self, count: int, prefix: str, *, length: int = 16) -> None:
        """Ids of `length` characters that begin with `prefix`."""
        for _ in range(count // AT_ONCE):
            for _ in range(AT_ONCE):
                self._num_sent += 1
                request_id = f"{prefix}{self._num_sent}".ljust(length, "-")
                self._socket.sendall(framing.pack(NewRequest(request_id, [5, 6, 7], SHORT)))
            for _ in range(AT_ONCE):
                while not self._has_ended(self.receive()):
                    pass

    def status(self) -> InstanceStatus:
        self._socket.sendall(framing.pack(StatusQuery(1)))
        message = self.receive()
        assert isinstance(message, InstanceStatus)
        return message

    def receive(self) -> FromInstance:
        size = int.from_bytes(self._file.read(4), "big")
        message: FromInstance = msgspec.msgpack.decode(self._file.read(size), type=FromInstance)
        return message

    @staticmethod
    def _has_ended(message: FromInstance) -> bool:
        assert isinstance(message, TokenOutput), message
        return message.finish_reason is not None

    def close(self) -> None:
        self._file.close()
        self._socket.close()


@pytest.fixture
def serving(make_config: MakeConfig) -> Iterator[InstanceConfig]:
    config, stop = make_config(), threading.Event()
    with LLM(config) as llm:
        thread = threading.Thread(target=Serving(llm.instance).run, args=(stop,))
        thread.start()
        yield config
        stop.set()
        thread.join()


def kept_ids(prefix: str) -> dict[str, str]:
    """Ids with this prefix that something in this process still refers to, and what that is."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        for part in gc.get_referents(thing):
            if type(part) is str and part.startswith(prefix):  # a mock may call itself one
                found[part] = f"{type(thing).__name__}: {str(thing)[:80]}"
    return found


def test_no_id_of_a_request_that_ended_is_kept(serving: InstanceConfig) -> None:
    # Given a gateway that stays
    gateway = Gateway(request_socket(serving.run_dir, serving.instance_id))
    # When many requests have come and gone
    gateway.serve(20 * AT_ONCE, "gone-")
    assert gateway.status().num_running == 0
    # Then nothing in the process knows any of them (the last ones may still be somebody's local variables)
    left = kept_ids("gone-")
    assert len(left) <= 4, list(left.items())[:20]
    gateway.close()


def test_the_memory_of_an_instance_does_not_grow_with_requests(make_config: MakeConfig, tmp_path: Path) -> None:
    # Given a real instance that is warm
    config = make_config(num_rblocks=64)
    file = tmp_path / "instance.json"
    file.write_text(config.model_dump_json())
    script = Path(__file__).with_name("instance_process.py")
    process = subprocess.Popen([sys.executable, str(script), str(file)], stdout=subprocess.DEVNULL, cwd=os.getcwd())
    try:
        gateway = Gateway(request_socket(config.run_dir, config.instance_id))
        gateway.serve(60 * AT_ONCE, "warm-", length=8000)
        before = resident_bytes(process.pid)
        # When thousands of requests more, with ids of 8,000 characters, come and go
        gateway.serve(160 * AT_ONCE, "more-", length=8000)
        # Then it is as large as before: the ids alone would be 20 MB
        assert resident_bytes(process.pid) - before < 8 * MIB
        gateway.close()
    finally:
        process.terminate()
        process.wait()


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_step_wakes_its_gateway_twice_at_most(serving: InstanceConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given an instance that many requests of one gateway run in
    num_sent, original = [0], RequestIO.send

    def send(self: RequestIO, *args: object) -> None:
        num_sent[0] += 1
        original(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(RequestIO, "send", send)
    with contextlib.closing(Gateway(request_socket(serving.run_dir, serving.instance_id))) as gateway:
        before = gateway.status().num_steps
        gateway.serve(10 * AT_ONCE, "batch-")
        num_steps = gateway.status().num_steps - before
    # Then each step has sent which requests begin and which tokens came, not one message for each of them
    assert num_sent[0] <= 2 * num_steps + 2 < 10 * AT_ONCE * SHORT.max_tokens
