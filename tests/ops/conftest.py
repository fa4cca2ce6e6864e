"""Every test of this room runs once on each backend, and each instruction set of it, that this machine has."""

from collections.abc import Iterator

import pytest
from megatron_distkv.kernels import cpu

from megatron_distkv.ops import available_backends, use_backend

INSTRUCTION_SETS = ("avx512bf16", "avx512", "avx2", "baseline")


def variants() -> list[str]:
    found = []
    if cpu.is_built():
        best = cpu.instruction_set()
        found = [f"cpu-{name}" for name in INSTRUCTION_SETS if cpu.use_instruction_set(name)]
        cpu.use_instruction_set(best)
    return [*found, *(name for name in available_backends() if name != "cpu")]


@pytest.fixture(scope="session", autouse=True, params=variants())
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    name, _, instruction_set = request.param.partition("-")
    use_backend(name)
    best = cpu.instruction_set() if cpu.is_built() else ""
    if instruction_set:
        cpu.use_instruction_set(instruction_set)
    yield request.param
    use_backend("auto")
    if best:
        cpu.use_instruction_set(best)
