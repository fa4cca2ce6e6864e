"""The documentation as its readers have it: pages, their code, headings and links."""

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
# A dated log names what was there at its time.
_HISTORY = {ROOT / "docs" / "experiments.md"}
PAGES = sorted({ROOT / "README.md", ROOT / "kernels" / "README.md", *(ROOT / "docs").glob("*.md")} - _HISTORY)
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
_CODE = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.M)


def fences(page: Path, *languages: str) -> Iterator[str]:
    """Text of the page's code blocks, of these languages if any are named."""
    for language, text in _FENCE.findall(page.read_text()):
        if not languages or language in languages:
            yield text


def prose(page: Path) -> str:
    """The page without its code blocks."""
    return _FENCE.sub("", page.read_text())


def code_words(page: Path) -> set[str]:
    """What stands in `backticks` in the page's prose."""
    return set(_CODE.findall(prose(page)))


def links(page: Path) -> set[str]:
    """Targets of links inside of the repository."""
    return {target for target in _LINK.findall(prose(page)) if "://" not in target}


def anchors(page: Path) -> set[str]:
    """As GitHub and mkdocs both make them of headings."""
    headings = (re.sub(r"[^\w\- ]", "", title.replace("`", "")) for title in _HEADING.findall(prose(page)))
    return {title.strip().lower().replace(" ", "-") for title in headings}


def command_lines(page: Path) -> Iterator[str]:
    """Every `distkv ...` that the page tells a reader to type, comments and later commands of the line left out."""
    typed = [line for text in fences(page, "") for line in text.replace("\\\n", " ").splitlines()]
    for line in (*typed, *code_words(page)):
        yield from re.findall(r"(?:^|&&|;)\s*(distkv [a-z]+(?![:\w])[^;#&|]*)", line)
