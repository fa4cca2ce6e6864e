"""A request whose instance is lost: another goes on; where nobody can, the client hears it and does not wait long."""

import asyncio
import contextlib
import string
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from megatron_distkv import framing
from megatron_distkv.clock import SystemClock
from megatron_distkv.config.admission import AdmissionConfig
from megatron_distkv.messages import NewRequest, RequestKV, RequestRefused, ToInstance, TokenOutput
from megatron_distkv.sampling_params import SamplingParams
from megatron_distkv.server.errors import ApiError
from megatron_distkv.server.router import Routed, Router
from tests.server.still_view import StillView, member

Answer = Callable[[NewRequest, asyncio.StreamWriter], Awaitable[None]]


async def speak_and_die(request: NewRequest, writer: asyncio.StreamWriter) -> None:
    writer.write(framing.pack(TokenOutput(request.request_id, [65])))
    await writer.drain()
    writer.close()


async def begin_and_die(request: NewRequest, writer: asyncio.StreamWriter) -> None:
    writer.write(framing.pack(TokenOutput(request.request_id, [])))
    await writer.drain()
    writer.close()


async def begin_and_hang(request: NewRequest, writer: asyncio.StreamWriter) -> None:
    writer.write(framing.pack(TokenOutput(request.request_id, [])))
    await writer.drain()


async def die(_: NewRequest, writer: asyncio.StreamWriter) -> None:
    writer.close()


async def refuse(request: NewRequest, writer: asyncio.StreamWriter) -> None:
    writer.write(framing.pack(RequestRefused(request.request_id, "too_long", "not now")))


async def leave_in_order(request: NewRequest, writer: asyncio.StreamWriter) -> None:
    writer.write(framing.pack(TokenOutput(request.request_id, [65])))
    writer.write(framing.pack(TokenOutput(request.request_id, [], kv=RequestKV(local_rblock_s=1.0))))
    await writer.drain()
    writer.close()


async def go_on(request: NewRequest, writer: asyncio.StreamWriter) -> None:
    tokens = [66] if request.output_token_ids == [65] else [0]
    writer.write(
        framing.pack(TokenOutput(request.request_id, tokens, finish_reason="length", kv=RequestKV(local_rblock_s=2.0)))
    )


async def ask(
    directory: Path,
    *answers: Answer,
    patience_s: float = 30.0,
    pinned: str | None = None,
    leases_end: bool = False,
) -> list[Routed]:
    """One request to instances a, b, ... that answer like this. `leases_end`: of one after the other."""

    def served(answer: Answer) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError), contextlib.closing(writer):
                while not reader.at_eof():
                    message = await framing.read(reader, msgspec.msgpack.Decoder(ToInstance))
                    if isinstance(message, NewRequest):
                        await answer(message, writer)

        return serve

    sockets = [directory / name for name in string.ascii_lowercase[: len(answers)]]
    servers = [
        await asyncio.start_unix_server(served(answer), path) for answer, path in zip(answers, sockets, strict=True)
    ]
    # None holds it alone, so the one with more free memory comes first
    view = StillView()
    router = Router(view, AdmissionConfig(), SystemClock(), patience_s)
    members = [member(socket.name, 6 - place, requests=socket) for place, socket in enumerate(sockets)]
    view.show(*members)

    async def end_leases() -> None:
        for place in range(1, len(members)):
            await asyncio.sleep(0.3)
            view.show(*members[place:])

    ending = asyncio.create_task(end_leases() if leases_end else asyncio.sleep(0))
    try:
        return [routed async for routed in router.generate([1] * 64, SamplingParams(max_tokens=8), pinned)]
    finally:
        await router.close()
        await ending
        for server in servers:
            server.close()
            await server.wait_closed()  # since Python 3.12 for its connections as well


@pytest.mark.parametrize("pinned", [None, "a"])
def test_another_goes_on_from_the_tokens_that_are_out(pinned: str | None, tmp_path: Path) -> None:
    routed = asyncio.run(asyncio.wait_for(ask(tmp_path, speak_and_die, go_on, pinned=pinned), 20))
    assert [token for x in routed for token in x.output.token_ids] == [65, 66]


@pytest.mark.parametrize(("first", "local_rblock_s", "num_untold"), [(speak_and_die, 2.0, 1), (leave_in_order, 3.0, 0)])
def test_the_receipt_is_of_all_who_could_still_tell(
    first: Answer, local_rblock_s: float, num_untold: int, tmp_path: Path
) -> None:
    begun, *_, ended = asyncio.run(asyncio.wait_for(ask(tmp_path, first, go_on), 20))
    assert begun.receipt == (RequestKV(), ("a",), 1)
    receipt = ended.receipt
    assert (receipt.instances, receipt.num_untold) == (("a", "b"), num_untold)
    assert receipt.kv.local_rblock_s == local_rblock_s


def test_where_nobody_can_go_on_the_patience_ends(tmp_path: Path) -> None:
    with pytest.raises(ApiError, match=r"lost after 1 tokens .* no other can go on: not now") as caught:
        asyncio.run(asyncio.wait_for(ask(tmp_path, speak_and_die, refuse, patience_s=0.6), 20))
    assert (caught.value.status, caught.value.code) == (502, "instance_lost")


def test_where_two_have_died_of_it_no_third_is_risked(tmp_path: Path) -> None:
    with pytest.raises(ApiError, match=r"2 instances in a row .* no token") as caught:
        asyncio.run(asyncio.wait_for(ask(tmp_path, begin_and_die, begin_and_die, go_on), 20))
    assert (caught.value.status, caught.value.code) == (502, "instance_lost")


def test_with_tokens_between_two_deaths_a_third_goes_on(tmp_path: Path) -> None:
    routed = asyncio.run(asyncio.wait_for(ask(tmp_path, begin_and_die, speak_and_die, go_on), 20))
    assert [token for x in routed for token in x.output.token_ids] == [65, 66]


def test_who_leaves_in_order_has_not_died_of_it(tmp_path: Path) -> None:
    async def leave_before_a_token(request: NewRequest, writer: asyncio.StreamWriter) -> None:
        writer.write(framing.pack(TokenOutput(request.request_id, [], kv=RequestKV())))
        await writer.drain()
        writer.close()

    routed = asyncio.run(asyncio.wait_for(ask(tmp_path, leave_before_a_token, begin_and_die, go_on), 20))
    assert [token for x in routed for token in x.output.token_ids] == [0]


def test_who_dies_before_it_has_begun_has_not_died_of_it(tmp_path: Path) -> None:
    routed = asyncio.run(asyncio.wait_for(ask(tmp_path, die, begin_and_die, die, go_on), 20))
    assert [token for x in routed for token in x.output.token_ids] == [0]


def test_who_is_only_silent_has_not_died_of_it(tmp_path: Path) -> None:
    asked = ask(tmp_path, begin_and_hang, begin_and_hang, go_on, leases_end=True)
    routed = asyncio.run(asyncio.wait_for(asked, 20))
    assert [token for x in routed for token in x.output.token_ids] == [0]
