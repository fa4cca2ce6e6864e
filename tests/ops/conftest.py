"""Every test of this room runs once on each backend, and each instruction set of it, that this machine has.

Where there is a GPU, all of it lies there and the C++ kernels rest; elsewhere Triton runs under its interpreter.
"""

from collections.abc import Iterator

import pytest
import torch
from megatron_distkv.kernels import cpu

from megatron_distkv.ops import available_backends, use_backend

INSTRUCTION_SETS = ("avx512bf16", "avx512", "avx2", "baseline")
SERVED_BY_LIBRARIES = (
    "test_full_rblocks",
    "test_every_head_size",
    "test_large_scores",
    "test_nothing_is_written",
    "test_full_blocks",
)
SLOW_WHERE_INTERPRETED = (
    "test_every_group_size",
    "test_every_rblock_size",
    "test_the_error_against_the_numbers_before",
    "test_any_split_in_any_order",
)
# One dtype of both is enough for these: the one that rounds.
OF_ROUNDED_ONES = ("test_every_head_size",)
# Tests of what is lost in a cast.
ROUNDING = ("test_stored_values", "test_every_head_size")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def variants() -> list[str]:
    others = [name for name in available_backends() if name != "cpu"]
    if DEVICE == "cpu":
        others = [f"{name}-interpreted" if name == "triton" else name for name in others]
    if DEVICE == "cuda" or not cpu.is_built():
        return others
    best = cpu.instruction_set()
    found = [f"cpu-{name}" for name in INSTRUCTION_SETS if cpu.use_instruction_set(name)]
    cpu.use_instruction_set(best)
    return [*found, *others]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The interpreter is slow, computes all floats as fp32, and knows no threads. Of a library on a CPU, which leaves
    much to the backends that are tested anyway, only what it serves."""
    if DEVICE == "cpu":
        items[:] = [
            item
            for item in items
            if not ("[triton" in item.name and _only_costs_time(item.name))
            and not (
                item.path.stem in ("test_sampling", "test_linear")
                and "[cpu" not in item.name
                and "[reference" not in item.name
            )
            and not (item.path.stem == "test_triton_launch" and "[triton" not in item.name)
            and not ("[flash_attn" in item.name and not item.name.startswith(SERVED_BY_LIBRARIES))
        ]
        for item in items:
            if "[triton" in item.name and _can_wait(item.name):
                item.add_marker(pytest.mark.nightly)


def _can_wait(name: str) -> bool:
    """It computes in fp32 whatever the dtype: one of both finds most of what is wrong with a kernel."""
    if name.startswith(OF_ROUNDED_ONES) and "torch.float32" in name:
        return True
    return name.startswith(SLOW_WHERE_INTERPRETED) or ("torch.bfloat16" in name and not name.startswith(ROUNDING))


def _only_costs_time(name: str) -> bool:
    return "torch.float16" in name or name.startswith("test_a_long_sequence")


@pytest.fixture(scope="package", autouse=True, params=variants())
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    name, _, variant = request.param.partition("-")
    use_backend(name)
    torch.set_default_device(DEVICE)
    best = cpu.instruction_set() if cpu.is_built() else ""
    if name == "cpu":
        cpu.use_instruction_set(variant)
    yield request.param
    use_backend("auto")
    torch.set_default_device(None)
    if best:
        cpu.use_instruction_set(best)
