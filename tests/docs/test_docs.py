"""What the documentation names is there: paths, options, keys, links. Its generated parts are what the code says."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_distkv.cli.main import COMMANDS
from megatron_distkv.config.base import parse_config
from tests.docs.pages import PAGES, ROOT, anchors, code_words, command_lines, fences, links
from tools.docs.commands import help_text
from tools.docs.configuration import FILES, keys_of
from tools.docs.generated import GENERATED, current_text

_TOP = ("megatron_distkv", "kernels", "launch", "configs", "tests", "tools", "docs")
_FILES = [str(path.relative_to(ROOT)) for top in _TOP for path in (ROOT / top).rglob("*") if path.is_file()]
_SUFFIXES = ("py", "lua", "md", "yaml", "toml", "cpp", "h")
_SECTIONS = sorted({key.path for kind in FILES.values() for key in keys_of(kind) if key.section is not None})
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def missing_paths(words: set[str]) -> list[str]:
    """Files, also by the end of their path (`ledger/keys.py`), and folders below the fixed ones."""
    missing = []
    for word in sorted(words):
        if re.fullmatch(rf"({'|'.join(_TOP)})/[\w./-]*", word) and not re.search(r"\.\w+$", word):
            missing += [] if (ROOT / word).is_dir() else [word]
        # Without a folder and an underscore it may be a reader's own file, such as host-1.yaml
        elif re.fullmatch(rf"[\w./-]+\.({'|'.join(_SUFFIXES)})", word) and ("/" in word or "_" in word):
            is_here = (ROOT / word).exists() or any(file.endswith(f"/{word}") for file in _FILES)
            missing += [] if is_here else [word]
    return missing


@every_page
def test_every_path_that_a_page_names_exists(page: Path) -> None:
    assert missing_paths(code_words(page)) == []


def test_every_file_of_the_tree_exists() -> None:
    # Given the file tree of docs/structure.md: folders by indentation, some files to a line
    [tree] = [text for text in fences(ROOT / "docs" / "structure.md") if "megatron_distkv/" in text]
    folders: list[tuple[int, str]] = []
    for line in tree.splitlines():
        indent = len(line) - len(line.lstrip())
        names = re.match(r"(?:[\w.-]+(?:/[\w.-]+)*(?:\.\w+|/),? *)+", line.strip())
        # Then each is there, under the folder above it
        while folders and folders[-1][0] >= indent:
            folders.pop()
        above = "".join(name for _, name in folders)
        for name in re.split(r"[, ]+", names[0].strip()) if names else []:
            assert (ROOT / above / name).exists(), f"{above}{name}"
            if name.endswith("/"):
                folders.append((indent, name))


@every_page
def test_every_option_that_a_page_names_exists(page: Path) -> None:
    for command in command_lines(page):
        words = shlex.split(command.replace("...", ""))
        assert words[1] in COMMANDS, command
        known = re.findall(r"--[a-z][\w-]*", help_text(words[1]))
        unknown = {word.partition("=")[0] for word in words if word.startswith("--")} - {*known, "--help"}
        assert not unknown, command


@every_page
def test_every_option_in_the_prose_is_of_some_command(page: Path) -> None:
    text = "".join(help_text(name) for name in COMMANDS)
    tools = "".join(file.read_text() for file in (ROOT / "tools").rglob("*.py"))
    known = {*re.findall(r"--[a-z][\w-]*", text + tools), "--help"}
    named = {word.split()[0].partition("=")[0] for word in code_words(page) if word.startswith("--")}
    assert named - known == set()


@every_page
def test_every_key_that_a_page_names_exists(page: Path) -> None:
    known = {key.path for kind in FILES.values() for key in keys_of(kind)}
    dotted = re.compile(rf"({'|'.join(map(re.escape, _SECTIONS))})(\.[a-z_0-9]+)+")
    named = {word.partition(":")[0] for word in code_words(page) if dotted.fullmatch(word.partition(":")[0])}
    others = tuple(f".{ending}" for ending in (*_SUFFIXES, "internal"))  # files, and names of hosts
    assert {word for word in named if not word.endswith(others)} - known == set()
    # `shared_memory: false` is a key of some section; api.md speaks of a request's keys so, metrics.md of Prometheus'
    set_alone = {found[1] for word in code_words(page) if (found := re.fullmatch(r"([a-z_]+): .+", word))}
    assert page.name in ("api.md", "metrics.md") or set_alone - {key.rpartition(".")[2] for key in known} == set()


@every_page
def test_every_yaml_file_that_a_page_shows_can_be_read(page: Path) -> None:
    for text in fences(page, "yaml"):
        if said := re.search(r"`distkv (\w+) --config", text):
            parse_config(FILES[said[1]], yaml.safe_load(text), page.name)


@every_page
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in links(page):
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), target
        assert not anchor or anchor in anchors(other), target


@pytest.mark.parametrize("page", GENERATED, ids=lambda page: page.name)
def test_generated_parts_are_what_the_code_says(page: Path) -> None:
    # Space is not compared: argparse breaks lines in other places from one Python to the next
    assert current_text(page).split() == page.read_text().split(), "stale: run `python -m tools.docs`"


def test_the_site_builds_and_its_links_hold(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", "tools/docs/mkdocs.yml", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
