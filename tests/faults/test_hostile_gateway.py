"""The door of an instance for gateways, and the gateway's door to instances: anything may come in, service goes on."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from megatron_distkv.config.instance import InstanceConfig
from megatron_distkv.engine.addresses import request_socket
from megatron_distkv.engine.llm import LLM
from megatron_distkv.engine.serving import Serving
from megatron_distkv.framing import MAX_MESSAGE_BYTES, pack
from megatron_distkv.messages import FromInstance, NewRequest, TokenOutput
from megatron_distkv.sampling_params import SamplingParams
from megatron_distkv.server.engine_client import EngineClient
from megatron_distkv.server.errors import ApiError, InstanceLost
from tests.faults.hostile import DEEP, messages, numbers, wild

SILENCE_S = 20.0
GREEDY = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
PROMPT = [5, 6, 7]


class Client:
    """One connection of a gateway, by hand."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(SILENCE_S)
        self._socket.connect(str(path))

    def send(self, data: bytes) -> None:
        with contextlib.suppress(ConnectionError):
            self._socket.sendall(data)

    def tokens(self, request_id: str) -> list[int]:
        """Send an honest request and wait for its end."""
        self.send(pack(NewRequest(request_id, PROMPT, GREEDY)))
        tokens: list[int] = []
        while True:
            size = int.from_bytes(self._receive(4), "big")
            message = msgspec.msgpack.decode(self._receive(size), type=FromInstance)
            assert isinstance(message, TokenOutput)
            tokens += message.token_ids
            if message.finish_reason is not None:
                return tokens

    def _receive(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            data += self._socket.recv(size - len(data)) or self._eof()
        return data

    @staticmethod
    def _eof() -> bytes:
        raise AssertionError("the instance has closed an honest gateway's connection")

    def close(self) -> None:
        self._socket.close()


class Victim:
    def __init__(self, config: InstanceConfig) -> None:
        self.llm = LLM(config)
        self.path = request_socket(config.run_dir, config.instance_id)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=Serving(self.llm.instance).run, args=(self._stop,))
        self._thread.start()
        self._num_asked = 0
        self.honest = Client(self.path)
        self.expected = self.honest.tokens("first")

    def assert_unharmed(self) -> None:
        assert self._thread.is_alive(), "the engine has died"
        self._num_asked += 1
        assert self.honest.tokens(f"honest-{self._num_asked}") == self.expected

    def close(self) -> None:
        self.honest.close()
        self._stop.set()
        self._thread.join()
        self.llm.instance.check_integrity()
        assert self.llm.instance.status(0).free_rblocks == 16
        self.llm.close()


@pytest.fixture(scope="module")
def victim(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    config = {
        "instance_id": "v", "model": llama, "run_dir": tmp_path_factory.mktemp("v"),
        "kv_cache": {"num_rblocks": 16, "rblock_size": 8},
    }  # fmt: skip
    made = Victim(InstanceConfig.model_validate(config))
    yield made
    made.close()


def framed(body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + body


def request(**changes: Any) -> bytes:
    sampling = {"max_tokens": 3, "ignore_eos": True, **changes.pop("sampling", {})}
    values = {"type": "new", "request_id": "r", "prompt_token_ids": PROMPT, "sampling": sampling, **changes}
    return framed(msgspec.msgpack.encode(values))


wild_floats = st.one_of(st.floats(), st.sampled_from([1e-320, 1e-45, 1e-40, 1e-8, 1.0, 100.0]))
wild_sampling = st.fixed_dictionaries(
    {},
    optional={
        "max_tokens": st.integers(-1, 4) | numbers, "temperature": wild_floats, "top_k": numbers, "top_p": wild_floats,
        "min_p": wild_floats, "seed": numbers, "logprobs": st.none() | st.integers(-1, 21),
        "stop_token_ids": st.lists(numbers, max_size=3),
    },
)  # fmt: skip
wild_request = wild(
    type=st.just("new"), request_id=st.sampled_from(["r", "honest-1", "x" * 2000, ""]),
    prompt_token_ids=st.lists(st.integers(0, 200) | numbers, max_size=150), sampling=wild_sampling,
    eos_token_ids=st.lists(numbers, max_size=3),
)  # fmt: skip
other = wild(type=st.sampled_from(["abort", "status", "?"]), request_id=st.just("r"), query_id=numbers)
frames = st.one_of(
    st.binary(max_size=40), messages.map(framed), wild_request.map(framed), other.map(framed), st.just(framed(DEEP)),
    st.just((MAX_MESSAGE_BYTES + 1).to_bytes(4, "big")), wild_sampling.map(lambda values: request(sampling=values)),
)  # fmt: skip
SLOW = settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@SLOW
@given(said=st.lists(frames, min_size=1, max_size=3))
@example(said=[request(sampling={"temperature": 1e-40})])
@example(said=[request(sampling={"temperature": 1e-320})])
@example(said=[request(sampling={"seed": (1 << 64) - 1})])
@example(said=[request(sampling={"top_p": 1e-300})])
@example(said=[request(), request()])
@example(said=[framed(DEEP)])
def test_whatever_a_gateway_says_the_instance_serves_on(victim: Victim, said: list[bytes]) -> None:
    client = Client(victim.path)
    for data in said:
        client.send(data)
    victim.assert_unharmed()
    client.close()
    victim.assert_unharmed()


def test_two_gateways_with_one_request_id_do_not_take_each_others_tokens(victim: Victim) -> None:
    clients = [Client(victim.path) for _ in range(2)]
    for client in clients:
        client.send(request(sampling={"max_tokens": 8}))
    for _ in range(5):
        victim.assert_unharmed()
    for client in clients:
        client.close()
    victim.assert_unharmed()


answers = wild(
    type=st.sampled_from(["token", "refused", "instance_status"]), request_id=st.sampled_from(["r", "s"]),
    token_ids=st.lists(numbers, max_size=3), finish_reason=st.sampled_from([None, "length"]), code=st.text(max_size=5),
    message=st.text(max_size=5), query_id=numbers,
)  # fmt: skip


@SLOW
@given(said=st.lists(st.binary(max_size=30) | messages.map(framed) | answers.map(framed), max_size=3))
@example(said=[framed(DEEP)])
def test_whatever_an_instance_says_the_gateway_hears_an_end(said: list[bytes], tmp_path: Path) -> None:
    async def ask() -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(ConnectionError), contextlib.closing(writer):
                await reader.read(4)
                for data in said:
                    writer.write(data)
                await writer.drain()

        path = tmp_path / "hostile.sock"
        path.unlink(missing_ok=True)
        server = await asyncio.start_unix_server(answer, path)
        client = EngineClient("hostile", path)
        try:
            async for output in client.generate(NewRequest("r", PROMPT, GREEDY)):
                assert isinstance(output, TokenOutput)
        except (ApiError, InstanceLost):
            pass
        finally:
            await client.close()
            server.close()
            await server.wait_closed()  # since Python 3.12 for its connections as well

    asyncio.run(asyncio.wait_for(ask(), SILENCE_S))
