"""An instance says when it begins with a request, and one that ends before its requests tells its part of them."""

import asyncio
import threading

from megatron_distkv.engine.addresses import request_socket
from megatron_distkv.engine.llm import LLM
from megatron_distkv.engine.serving import Serving
from megatron_distkv.messages import NewRequest, TokenOutput
from megatron_distkv.sampling_params import SamplingParams
from megatron_distkv.server.engine_client import EngineClient
from megatron_distkv.server.errors import InstanceLost
from tests.conftest import MakeConfig


def test_an_instance_told_to_end_tells_what_its_requests_held(make_config: MakeConfig) -> None:
    config = make_config("a", num_rblocks=64)
    stop = threading.Event()
    outputs: list[TokenOutput] = []

    async def ask() -> None:
        # Given a request in the middle of its answer
        client = EngineClient("a", request_socket(config.run_dir, "a"))
        request = NewRequest("r", [5] * 30, SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True))
        try:
            async for output in client.generate(request):
                outputs.append(output)
                if len(outputs) == 3:
                    stop.set()  # When its instance is told to end
        except InstanceLost:
            pass
        finally:
            await client.close()

    with LLM(config) as llm:
        thread = threading.Thread(target=Serving(llm.instance).run, args=(stop,))
        thread.start()
        asyncio.run(asyncio.wait_for(ask(), 60))
        thread.join()
    # Then its first word was that it begins, and its last is the receipt so far, and no end
    assert (outputs[0].token_ids, outputs[0].kv) == ([], None)
    last = outputs[-1]
    assert (last.token_ids, last.finish_reason) == ([], None)
    assert last.kv is not None
    assert last.kv.max_local_rblocks > 0
    assert last.kv.local_rblock_s > 0
