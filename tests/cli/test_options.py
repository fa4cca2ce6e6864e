"""Options beside a configuration file: both together make a configuration, and the options win."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_distkv.cli import lend, serve, up
from megatron_distkv.config.base import FrozenConfig
from megatron_distkv.errors import ConfigError

Parse = Callable[..., FrozenConfig]


@pytest.fixture
def parsed(tmp_path: Path) -> Parse:
    """(command, its configuration file, options) -> the configuration."""

    def parse(command: Any, text: str, *options: str) -> FrozenConfig:
        file = tmp_path / "file.yaml"
        file.write_text(text)
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        config: FrozenConfig = command.configuration(parser.parse_args(["--config", str(file), *options]))
        return config

    return parse


def test_an_option_may_bring_what_the_file_lacks(parsed: Parse, tmp_path: Path) -> None:
    model = ("--model", str(tmp_path))
    pool = parsed(up, "instances: 2\nthreads: 2\nkv_cache: {rblock_size: 16}", *model, "--num-rblocks", "99")
    assert pool.model_dump(include={"model", "instances", "threads"}) == {
        "model": tmp_path, "instances": 2, "threads": 2
    }  # fmt: skip
    assert pool.model_dump()["kv_cache"]["num_rblocks"] == 99
    assert pool.model_dump()["kv_cache"]["rblock_size"] == 16
    instance = parsed(serve, "ledger: {url: redis://there}", *model, "--instance-id", "a", "--pool", "ours")
    assert instance.model_dump()["ledger"]["url"] == "redis://there"
    assert instance.model_dump()["ledger"]["pool"] == "ours"
    lender = parsed(lend, "ledger: {url: redis://there}\nlender_id: l", "--num-rblocks", "7", "--threads", "2")
    assert lender.model_dump(include={"num_rblocks", "threads", "lender_id"}) == {
        "num_rblocks": 7, "threads": 2, "lender_id": "l"
    }  # fmt: skip


def test_an_option_wins(parsed: Parse, tmp_path: Path) -> None:
    pool = parsed(
        up, "model: /nowhere\ninstances: 2\nkv_cache: {num_rblocks: 5}", "--instances", "4", "--num-rblocks", "6"
    )
    assert pool.model_dump()["instances"] == 4
    assert pool.model_dump()["kv_cache"]["num_rblocks"] == 6


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("kv_cache: 3", "kv_cache: Input should be a valid"),
        ("kv_cache:", "kv_cache: Input should be a valid"),
        ("kv_cash: {}", "unknown key 'kv_cash'"),
        ("[1, 2]", "must hold a mapping"),
    ],
)
def test_what_is_wrong_in_the_file_is_one_sentence(parsed: Parse, text: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=f"file.yaml.*{sentence}"):
        parsed(up, text, "--model", "/nowhere", "--num-rblocks", "6")
