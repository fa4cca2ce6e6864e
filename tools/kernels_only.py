"""Lets `megatron_distkv.ops` be imported from a checkout on a machine where the package and most of what it needs are
not installed (a GPU machine without a network): the kernels lie in a folder of another name than their package.

Import it first, or give it to pytest: `pytest -p tools.kernels_only --confcutdir tests/ops tests/ops`.
"""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def make_importable() -> None:
    sys.path.insert(0, str(ROOT))
    if importlib.util.find_spec("megatron_distkv.kernels") is not None:
        return
    folder = ROOT / "kernels"
    spec = importlib.util.spec_from_file_location(
        "megatron_distkv.kernels", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["megatron_distkv.kernels"] = module
    spec.loader.exec_module(module)


make_importable()
