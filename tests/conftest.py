"""Small models and configurations for the tests of whole instances."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_distkv.config.instance import InstanceConfig
from megatron_distkv.engine.llm import LLM
from megatron_distkv.ledger.embedded_server import EmbeddedServer
from tests.model.llamas import save_llama

# Files that take half a minute and more, the longest first: with short ones at the end no worker waits for another.
SLOW_FILES = (
    "e2e/test_chaos.py",
    "training/test_deepspeed.py",
    "e2e/test_unequal_tensor_parallelism.py",
    "e2e/test_faults.py",
    "e2e/test_up.py",
    "e2e/test_end_in_a_drain.py",
    "e2e/test_drain.py",
    "e2e/test_walk.py",
    "training/test_documents.py",
    "e2e/test_handover.py",
    "e2e/test_lender.py",
    "tools/test_gpu_check.py",
    "training/test_killed.py",
    "tools/test_compile_triton.py",
    "model/test_deepspeed.py",
    "ops/test_conformance.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--nightly", action="store_true", help="also the tests that `make nightly` runs and `make test` not"
    )


def pytest_configure(config: pytest.Config) -> None:
    """xdist would begin with files of many tests, and those of one long test come last."""
    config.option.loadscopereorder = False


@pytest.hookimpl(trylast=True)  # after rooms have marked their own
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ranks = {Path(__file__).parent / file: rank for rank, file in enumerate(SLOW_FILES)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))
    if not config.getoption("nightly"):
        late = [item for item in items if item.get_closest_marker("nightly")]
        config.hook.pytest_deselected(items=late)
        items[:] = [item for item in items if item not in set(late)]


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def byte_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary of bytes: the gateway needs no tokenizer.json for it."""
    return save_llama(tmp_path_factory.mktemp("byte-llama"), vocab_size=272)


@pytest.fixture
def server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer() as running:
        yield running


MakeConfig = Callable[..., InstanceConfig]


@pytest.fixture
def make_config(llama: Path, tmp_path: Path) -> MakeConfig:
    def make(
        name: str = "a", *, num_rblocks: int = 64, url: str = "memory://", **rooms: dict[str, Any]
    ) -> InstanceConfig:
        values: dict[str, Any] = {
            "instance_id": name,
            "model": llama,
            "run_dir": tmp_path,
            "kv_cache": {"num_rblocks": num_rblocks, "rblock_size": 8},
            "ledger": {"url": url, "heartbeat_interval_s": 0.1, "lease_s": 2.0},
            **rooms,
        }
        return InstanceConfig.model_validate(values)

    return make


@pytest.fixture
def llm(make_config: MakeConfig) -> Iterator[LLM]:
    with LLM(make_config()) as one:
        yield one
