"""Any checkpoint's directory is served as it is: transformers' tokens from every format."""

import logging
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_distkv.engine.llm import LLM
from megatron_distkv.errors import UserError
from megatron_distkv.model.weights import CheckpointFormat, find_checkpoint, open_source, write_checkpoint
from megatron_distkv.sampling_params import SamplingParams
from tests.conftest import MakeConfig
from tests.model.families import save_family

GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
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


def transformers_tokens(path: Path, prompt: list[int]) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(8):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize(("family", "to"), [("qwen2-tied", "legacy"), ("qwen3-yarn", "torch_dist"), ("llama3", "hf")])
def test_every_format_gives_transformers_tokens(family: str, to: str, make_config: MakeConfig, tmp_path: Path) -> None:
    source = save_family(family, tmp_path / "source")
    checkpoint = find_checkpoint(source)
    opened = open_source(checkpoint, checkpoint.model)
    write_checkpoint(opened, checkpoint.model, CheckpointFormat(to), tmp_path / "copy", tensor_parallel=2)
    log = Log()
    with log, LLM(make_config(model=tmp_path / "copy")) as llm:
        found = [completion.token_ids for completion in llm.generate(PROMPTS, GREEDY)]
    assert found == [transformers_tokens(source, prompt) for prompt in PROMPTS]
    assert f"loading {find_checkpoint(tmp_path / 'copy')}" in log.lines


def test_a_context_beyond_a_sliding_window_is_refused_not_computed_wrongly(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    source = save_family("mistral-window", tmp_path / "hf")
    within = list(range(3, 59))
    with LLM(make_config(model=source)) as llm:
        (found,) = llm.generate([within], GREEDY)  # 63 tokens are attended to
        with pytest.raises(UserError, match="the longest that fits now is 64"):
            llm.generate([[*within, 3, 3]], GREEDY)
    assert found.token_ids == transformers_tokens(source, within)
