"""Changes a part of a pool before it runs, without a line of the product's: its modules are patched at their import.

`environment(module, directory)` is what a child needs for it: Python imports the `sitecustomize` that lies in
`directory` before anything else, and that calls `patch_imports`. `module` has a table
PATCHES = {name of a module: what is called with that module once it has been executed}.
"""

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

Patch = Callable[[ModuleType], None]
_ROOT = Path(__file__).parents[3]


def environment(module: str, directory: Path) -> dict[str, str]:
    """Makes `directory`; a child with these variables runs with the PATCHES of `module`."""
    directory.mkdir(parents=True, exist_ok=True)
    source = f"from tools.bench.chaos.seam import patch_imports\n\npatch_imports({module!r})\n"
    (directory / "sitecustomize.py").write_text(source)
    paths = [str(directory), str(_ROOT), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def patch_imports(module: str) -> None:
    sys.meta_path.insert(0, _Finder(importlib.import_module(module).PATCHES))


class _Finder(MetaPathFinder):
    def __init__(self, patches: Mapping[str, Patch]) -> None:
        self._patches = dict(patches)

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        patch = self._patches.pop(name, None)  # taken out first: the search below comes by here again
        spec = importlib.util.find_spec(name) if patch is not None else None
        if patch is None or spec is None or spec.loader is None:
            return None
        spec.loader = _Patching(spec.loader, patch)
        return spec


class _Patching(Loader):
    def __init__(self, loader: Loader, patch: Patch) -> None:
        self._loader = loader
        self._patch = patch

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._patch(module)
