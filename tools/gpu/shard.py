"""A pytest plugin: `-p tools.gpu.shard --shard 2/8` runs every eighth test, from the third on.

On a GPU most of a suite's time is Triton's compiler, which is one thread of a process: so several share the tests.
"""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", default="0/1", help="which one of how many")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    which, count = map(int, config.getoption("--shard").split("/"))
    items[:] = items[which::count]


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and session.config.getoption("--shard") != "0/1":
        session.exitstatus = pytest.ExitCode.OK  # others have them
