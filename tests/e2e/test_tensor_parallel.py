"""Two instances of two ranks each, started by the deepspeed launcher, lend each other memory."""

import threading
from pathlib import Path

from megatron_distkv.launch.local_cluster import LocalCluster

from megatron_distkv.cli.main import main
from megatron_distkv.ledger.embedded_server import EmbeddedServer
from megatron_distkv.ledger.opening import open_ledger
from tests.e2e.conftest import OWN_TOKENS, Reference, cluster_config, openai_client
from tests.e2e.test_api import GREEDY, as_text, random_prompt, wait_for_no_debts


def test_tensor_parallel_instances_lend_and_agree_with_one_rank(
    byte_llama: Path, reference: Reference, server: EmbeddedServer
) -> None:
    ledger = {"url": server.url, "heartbeat_interval_s": 0.1, "lease_s": 300.0}
    changes = {"tensor_parallel": 2, "launcher": "deepspeed", "ledger": ledger, "start_timeout_s": 600.0}
    config = cluster_config(byte_llama, instances=2, **changes)
    with LocalCluster(config) as cluster, openai_client(cluster) as client:
        for length in (20, int(1.6 * OWN_TOKENS)):
            prompt = random_prompt(length, seed=length)
            answer = client.completions.create(prompt=prompt, max_tokens=12, **GREEDY)
            assert answer.choices[0].text == as_text(reference(prompt, 12))
            (kv,) = answer.usage.kv  # type: ignore[union-attr]
            assert bool(kv["max_borrowed_rblocks"]) == (length > OWN_TOKENS)
        wait_for_no_debts(cluster)

        # When one of them leaves in mid-stream
        prompt, usage, text, drain = random_prompt(40, seed=40), None, "", None
        body = {"ignore_eos": True, "instance": "instance-0"}
        greedy = {"model": "distkv", "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
        for chunk in client.completions.create(prompt=prompt, max_tokens=80, extra_body=body, **greedy):
            usage = chunk.usage or usage
            text += "".join(choice.text for choice in chunk.choices)
            if drain is None:
                arguments = [
                    "drain",
                    "instance-0",
                    "--ledger",
                    cluster.ledger_url,
                    "--pool",
                    cluster.config.ledger.pool,
                ]
                drain = threading.Thread(target=main, args=(arguments,))
                drain.start()
        # Then the other goes on with the KV of both ranks
        assert drain is not None
        drain.join()
        assert text == as_text(reference(prompt, 80))
        (kv,) = usage.kv  # type: ignore[union-attr]
        assert (kv["instance"], kv["num_recomputed_tokens"]) == ("instance-1", 0)
        # And it has ended in order
        assert cluster.child("instance-0").process.wait(60) == 0
        ended = cluster.ended("instance-0")
        assert ended is not None
        assert ended.is_in_order
    # And so has the other one with the pool, long before its lease, although the launcher ends before its ranks do
    assert open_ledger(server.url, "default").snapshot().instances == ()
