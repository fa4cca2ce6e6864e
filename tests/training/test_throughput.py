"""What a step's operations are counted as, and what the log keeps."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_distkv.config.model import ModelConfig
from megatron_distkv.model import build_gpt, init_tensor_parallel
from megatron_distkv.training.run_log import RunLog, read_log
from megatron_distkv.training.throughput import keys_seen, measure_peak_flops, train_flops

MODEL = ModelConfig(
    num_layers=3, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, num_kv_heads=2, head_dim=32, vocab_size=128
)


def test_operations_are_those_that_torch_counts() -> None:
    gpt = build_gpt(MODEL, init_tensor_parallel(1), init_std=0.1)
    ids = torch.randint(128, (2, 50))
    with FlopCounterMode(display=False) as counter:
        gpt(ids, None, None, labels=ids).mean().backward()
    # Given torch, which does not count attention on CPUs, and counts the products around it
    assert counter.get_total_flops() == train_flops(MODEL, 100, 0)
    # Then attention adds two products for each pair of a query and a key it sees, forward, and twice that backward
    pairs = 2 * keys_seen(50, (0,))
    assert train_flops(MODEL, 100, pairs) - train_flops(MODEL, 100, 0) == 3 * 3 * 2 * 2 * 4 * 32 * pairs


@pytest.mark.parametrize(("starts", "expected"), [((0,), 55), ((0, 4), 10 + 21), (tuple(range(10)), 10)])
def test_keys_seen_end_with_their_document(starts: tuple[int, ...], expected: int) -> None:
    assert keys_seen(10, starts) == expected


def test_a_device_computes_something() -> None:
    assert measure_peak_flops("fp32") > 1e6


def test_the_progress_bar_says_how_fast_it_goes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for is_first in (True, False):
        log = RunLog(tmp_path, 0, 1, is_first=is_first)
        for step in log.steps():
            log.write(step + 1, loss=1.23456, tokens_per_s=4321.0, mfu=0.375)
        shown = capsys.readouterr().err
        # Then the first rank shows it, and the others nothing
        assert ("loss=1.235, tokens_per_s=4321, mfu=37.5%" in shown) == is_first
        assert is_first or shown == ""


def test_a_run_that_goes_on_forgets_what_it_will_do_again(tmp_path: Path) -> None:
    # Given a log up to step 4, its last line cut off by a crash
    log = RunLog(tmp_path, 0, 5, is_first=True)
    for step in log.steps():
        log.write(step + 1, loss=float(step))
    file = tmp_path / "log.jsonl"
    file.write_text(file.read_text()[:-5])
    assert [line["step"] for line in read_log(file)] == [1, 2, 3, 4]
    # When a run goes on from step 2
    again = RunLog(tmp_path, 2, 4, is_first=True)
    for step in again.steps():
        again.write(step + 1, loss=10.0 + step)
    again.close()
    assert [json.loads(line)["loss"] for line in file.read_text().splitlines()] == [0.0, 1.0, 12.0, 13.0]
    # And one that starts anew forgets all
    RunLog(tmp_path, 0, 4, is_first=True)
    assert read_log(file) == []
