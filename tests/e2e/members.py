"""Members of a pool as processes that a test places and asks one by one, without a gateway."""

import socket
import struct
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from megatron_distkv.launch.commands import Launcher, command_line, instance_command
from megatron_distkv.launch.processes import Child

from megatron_distkv import framing
from megatron_distkv.config.instance import InstanceConfig
from megatron_distkv.config.lender import LenderConfig
from megatron_distkv.engine.addresses import request_socket
from megatron_distkv.messages import NewRequest, RequestKV, TokenOutput, decode
from megatron_distkv.sampling_params import SamplingParams

START_TIMEOUT_S = 180.0
# Two heartbeats, and what a busy machine adds.
KNOWN_WITHIN_S = 20.0
_ENVIRONMENT = {"PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1", "DISTKV_SECRET": "correct horse battery staple"}


class Said(NamedTuple):
    token_ids: list[int]
    kv: RequestKV


class Members:
    """`with Members(model, directory, ledger_url) as members:`; all end with it."""

    def __init__(self, model: Path, directory: Path, ledger_url: str) -> None:
        self.directory = directory
        self._model = model
        self._ledger = {"url": ledger_url, "heartbeat_interval_s": 0.1, "lease_s": 5.0}
        self._stack = ExitStack()
        self._children: dict[str, Child] = {}

    def __enter__(self) -> "Members":
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._children.values():
            child.terminate()
        for child in self._children.values():
            child.end()

    def start_instance(
        self, name: str, *, launcher: Launcher = "python", within: Sequence[str] = (), **rooms: Any
    ) -> None:
        """`within`: a command that runs another, as `ip netns exec NAME`."""
        values = {
            "instance_id": name,
            "model": self._model,
            "run_dir": self.directory,
            "kv_cache": {"num_rblocks": 16, "rblock_size": 8},
            "scheduler": {"max_batched_tokens": 48},
            "ledger": self._ledger,
            **rooms,
        }
        config = InstanceConfig.model_validate(values)
        self._start(name, config.model_dump_json(), lambda file: instance_command(config, file, launcher), within)

    def start_lender(self, name: str, num_rblocks: int, *, within: Sequence[str] = (), **rooms: Any) -> None:
        values = {"lender_id": name, "run_dir": self.directory, "num_rblocks": num_rblocks, "ledger": self._ledger}
        config = LenderConfig.model_validate({**values, **rooms})
        self._start(name, config.model_dump_json(), lambda file: command_line("lend", "--config", str(file)), within)

    def wait(self) -> None:
        """Until all serve."""
        end_s = time.monotonic() + START_TIMEOUT_S
        for name, child in self._children.items():
            while child.ready_line() is None:
                assert child.is_running, f"{name}: {child.log.read_text()[-2000:]}"
                assert time.monotonic() < end_s, f"{name} is not ready: {child.log.read_text()[-2000:]}"
                time.sleep(0.1)

    def ask(self, name: str, prompt: list[int], max_tokens: int) -> "Conversation":
        """Who has just joined knows the others with its next heartbeats: what is too long then, may fit now."""
        end_s = time.monotonic() + KNOWN_WITHIN_S
        while True:
            conversation = Conversation(request_socket(self.directory, name), prompt, max_tokens)
            if conversation.is_taken or time.monotonic() > end_s:
                return conversation
            conversation.close()
            time.sleep(0.1)

    def _start(self, name: str, config: str, command: Any, within: Sequence[str]) -> None:
        file = self.directory / f"{name}.json"
        file.write_text(config)
        self._children[name] = Child(name, [*within, *command(file)], self.directory / f"{name}.log", _ENVIRONMENT)


class Conversation:
    """A greedy request to one instance. `tokens()` waits for the next ones, `rest()` for the end."""

    def __init__(self, path: Path, prompt: list[int], max_tokens: int) -> None:
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.settimeout(60)
        self._connection.connect(str(path))
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        self._connection.sendall(framing.pack(NewRequest("asked", prompt, sampling)))
        self._token_ids: list[int] = []
        self._first: bytes | None = self._read()

    @property
    def is_taken(self) -> bool:
        """False: the instance refused it, before any work."""
        return self._first is None or b"refused" not in self._first

    def close(self) -> None:
        self._connection.close()

    def next(self) -> TokenOutput:
        """The next tokens; before the first ones the instance says that it begins."""
        while True:
            data, self._first = self._first or self._read(), None
            output = decode(data, TokenOutput)
            if output.token_ids or output.finish_reason is not None:
                self._token_ids += output.token_ids
                return output

    def _read(self) -> bytes:
        (size,) = struct.unpack(">I", self._receive(4))
        return self._receive(size)

    def rest(self) -> Said:
        while True:
            output = self.next()
            if output.finish_reason is not None:
                assert output.kv is not None
                self._connection.close()
                return Said(self._token_ids, output.kv)

    def _receive(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = self._connection.recv(size - len(data))
            assert piece, "the instance has closed the connection"
            data += piece
        return data
