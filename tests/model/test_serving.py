"""Any checkpoint's directory is served as it is: transformers' tokens from every format."""

import logging
from pathlib import Path

import pytest
import torch
from megatron_distkv.launch.local_cluster import LocalCluster
from transformers import AutoModelForCausalLM

from megatron_distkv.engine.llm import LLM
from megatron_distkv.ledger.embedded_server import EmbeddedServer
from megatron_distkv.messages import TokenLogprobs
from megatron_distkv.model.weights import CheckpointFormat, find_checkpoint, open_source, write_checkpoint
from megatron_distkv.request import Request
from megatron_distkv.sampling_params import SamplingParams
from tests.conftest import MakeConfig
from tests.e2e.conftest import cluster_config, openai_client
from tests.e2e.test_api import GREEDY as GREEDY_BODY
from tests.e2e.test_api import as_text
from tests.model.families import save_family
from tests.model.zero3 import save_zero3

GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, logprobs=3)
PROMPTS = [list(range(3, 50)), [7, 5, 3]]


class Log(logging.Handler):
    """What is said while a checkpoint is read, whatever other tests have done to logging."""

    def __enter__(self) -> "Log":
        self.lines: list[str] = []
        self._logger = logging.getLogger("distkv.model.weights.checkpoint")
        self._logger.addHandler(self)
        self._logger.setLevel(logging.INFO)
        return self

    def __exit__(self, *_: object) -> None:
        self._logger.removeHandler(self)
        self._logger.setLevel(logging.NOTSET)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def transformers_logprobs(path: Path, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = AutoModelForCausalLM.from_pretrained(path).eval()(torch.tensor([ids])).logits[0]
    return logits.log_softmax(-1)


def transformers_tokens(path: Path, prompt: list[int]) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(8):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


SERVED = [("qwen2-tied", "legacy"), ("qwen3-yarn", "torch_dist"), ("llama3", "hf"), ("qwen3", "deepspeed")]


@pytest.mark.parametrize(("family", "to"), SERVED)
def test_every_format_gives_transformers_tokens(family: str, to: str, make_config: MakeConfig, tmp_path: Path) -> None:
    source = save_family(family, tmp_path / "source")
    if to == "deepspeed":
        save_zero3(tmp_path / "copy", source)
    else:
        checkpoint = find_checkpoint(source)
        opened = open_source(checkpoint, checkpoint.model)
        write_checkpoint(opened, checkpoint.model, CheckpointFormat(to), tmp_path / "copy", tensor_parallel=2)
    log = Log()
    with log, LLM(make_config(model=tmp_path / "copy")) as llm:
        found = [completion.token_ids for completion in llm.generate(PROMPTS, GREEDY)]
    assert found == [transformers_tokens(source, prompt) for prompt in PROMPTS]
    assert f"loading {find_checkpoint(tmp_path / 'copy')}" in log.lines


# Windows that end in borrowed memory: pools hold 128 tokens, contexts are longer, windows of 11 see nothing elsewhere.
BORROWED = {
    "mistral-window": {"sliding_window": 170},
    "qwen2-window": {"sliding_window": 11},
    "gemma2": {"sliding_window": 150},
    "gemma3": {"sliding_window": 11},
}


@pytest.mark.parametrize("family", list(BORROWED))
def test_windows_and_soft_caps_reach_into_host_memory_and_borrowed_memory(
    family: str, make_config: MakeConfig, tmp_path: Path, server: EmbeddedServer
) -> None:
    # Given an instance of 16 rBlocks with 8 more in host memory, one that lends, and every answer computed again
    source = save_family(family, tmp_path / "hf", **BORROWED[family])
    prompt = torch.randint(3, 131, (300,), generator=torch.Generator().manual_seed(3)).tolist()
    cache = {"num_rblocks": 16, "num_host_rblocks": 8, "rblock_size": 8}
    rooms = {"model": source, "scheduler": {"max_batched_tokens": 48}, "lending": {"verify_one_in": 1}}
    with (
        LLM(make_config("a", url=server.url, kv_cache=cache, **rooms)) as a,
        LLM(make_config("b", url=server.url, **rooms)),
    ):
        # When a context comes that is longer than both
        request = Request("long", prompt, GREEDY)
        logprobs: list[TokenLogprobs] = []
        a.instance.add(request)
        while not a.instance.scheduler.is_idle:
            for output in a.instance.step():
                logprobs.extend(output.logprobs or [])
    # Then its tokens and their probabilities are transformers', and nothing was lost and computed again
    best = transformers_logprobs(source, prompt + request.output_token_ids)[len(prompt) - 1 : -1].topk(3)
    assert request.output_token_ids == best.indices[:, 0].tolist()
    found = torch.tensor([[logprob for _, logprob in token.top] for token in logprobs])
    assert torch.allclose(found, best.values, atol=1e-4)
    assert request.max_host_rblocks == 8
    assert request.max_borrowed_rblocks["b"] > 8  # type: ignore[index]
    assert request.num_recomputed_tokens == 0


def test_two_ranks_reach_with_a_window_into_borrowed_memory(tmp_path: Path) -> None:
    # Given a pool of a Mistral on two ranks, and a lender that knows no model
    source = save_family("mistral-window", tmp_path / "hf", vocab_size=272, sliding_window=170)
    config = cluster_config(source, instances=1, tensor_parallel=2, lenders=1, lender_rblocks=64, launcher="deepspeed")
    prompt = torch.randint(3, 120, (300,), generator=torch.Generator().manual_seed(3)).tolist()
    with LocalCluster(config) as cluster, openai_client(cluster) as client:
        answer = client.completions.create(prompt=prompt, max_tokens=8, **GREEDY_BODY)
    # Then a context longer than the window and than its memory has transformers' tokens
    assert answer.choices[0].text == as_text(transformers_tokens(source, prompt))
    (kv,) = answer.usage.kv  # type: ignore[union-attr]
    assert kv["max_borrowed_rblocks"]["lender-0"] > 16
