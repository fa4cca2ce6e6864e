"""docs/dependencies.md: every name of a library that may change without a word, and the one file that touches it."""

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "dependencies.md"
LIBRARIES = ("torch", "megatron", "deepspeed", "transformers")


class Row(NamedTuple):
    names: list[str]
    file: str


def rows() -> list[Row]:
    cells = [
        line.split("|")[2:4] for line in PAGE.read_text().splitlines() if re.match(r"\| (Mega|Deep|torch \| `)", line)
    ]
    return [Row(re.findall(r"`([\w.]+)`", names), file.strip(" `")) for names, file in cells if "`" in file]


def sources() -> Iterator[tuple[str, ast.Module]]:
    for room in ("megatron_distkv", "kernels", "launch"):
        for path in sorted((ROOT / room).rglob("*.py")):
            yield str(path.relative_to(ROOT)).removeprefix("megatron_distkv/"), ast.parse(path.read_text())


def private_names(tree: ast.Module) -> Iterator[str]:
    """`module.name` of each private name that is imported from, or looked up in, a library."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in LIBRARIES:
            for name in node.names:
                if any(is_private(part) for part in [*str(node.module).split("."), name.name]):
                    yield f"{node.module}.{name.name}"
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            dotted = ast.unparse(node)
            if dotted.partition(".")[0] in LIBRARIES and re.fullmatch(r"[\w.]+", dotted):
                yield dotted


def is_private(name: str) -> bool:
    return name.startswith("_") and name != "__version__"


def found(dotted: str) -> Any:
    """The object of that name; raises when it is gone."""
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
        try:
            value: Any = importlib.import_module(".".join(parts[:count]))
        except ImportError:
            continue
        for part in parts[count:]:
            value = getattr(value, part)
        return value
    raise ImportError(dotted)


def test_the_page_lists_every_private_name_with_its_file() -> None:
    listed = {(name, row.file) for row in rows() for name in row.names}
    touched = {(name, file) for file, tree in sources() for name in private_names(tree)}
    assert len(listed) > 15
    assert touched - listed == set()


@pytest.mark.parametrize("name", sorted({name for row in rows() for name in row.names if "." in name}))
def test_a_listed_name_is_in_the_installed_version(name: str) -> None:
    found(name)


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.names[0])
def test_the_file_of_a_listed_name_touches_it(row: Row) -> None:
    path = ROOT / row.file if row.file.startswith("kernels/") else ROOT / "megatron_distkv" / row.file
    text = path.read_text()
    assert [name for name in row.names if name.rpartition(".")[2] not in text] == []


@pytest.mark.parametrize("name", ["GPTModel", "get_gpt_layer_local_spec", "gpt_layer_specs"])
def test_one_file_names_megatrons_model(name: str) -> None:
    naming = [
        file
        for file, tree in sources()
        if any(
            name in (getattr(node, "id", ""), getattr(node, "name", ""), *str(getattr(node, "module", "")).split("."))
            for node in ast.walk(tree)
        )
    ]
    assert naming == ["model/megatron_gpt.py"]
