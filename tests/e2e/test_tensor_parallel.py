"""Two instances of two ranks each, started by the deepspeed launcher, lend each other memory."""

from pathlib import Path

from megatron_distkv.launch.local_cluster import LocalCluster

from tests.e2e.conftest import OWN_TOKENS, Reference, cluster_config, openai_client
from tests.e2e.test_api import GREEDY, as_text, random_prompt, wait_for_no_debts


def test_tensor_parallel_instances_lend_and_agree_with_one_rank(byte_llama: Path, reference: Reference) -> None:
    config = cluster_config(byte_llama, instances=2, tensor_parallel=2, launcher="deepspeed")
    with LocalCluster(config) as cluster, openai_client(cluster) as client:
        for length in (20, int(1.6 * OWN_TOKENS)):
            prompt = random_prompt(length, seed=length)
            answer = client.completions.create(prompt=prompt, max_tokens=12, **GREEDY)
            assert answer.choices[0].text == as_text(reference(prompt, 12))
            (kv,) = answer.usage.kv  # type: ignore[union-attr]
            assert bool(kv["max_borrowed_rblocks"]) == (length > OWN_TOKENS)
        wait_for_no_debts(cluster)
