"""Tests speak through public seams: what they touch of others' private names is counted, listed and has its reason."""

import re
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parents[1]
# `x._name` of anything but self and cls, also within a text (a script, a name of another library), and `"_name"`, by
# which it could be looked up or replaced all the same.
PRIVATE = re.compile(r"""(?<!\bself)(?<!\bcls)\._[a-z]\w*|(?<!endswith\()(["'])_[a-z]\w*\1""")
# A comment that says something; those for tools do not.
REASON = re.compile(r"# (?!noqa|type:|fmt:)\w")
# So many there are. A new one needs a better way first: a public seam that a user would want too, or a test where the
# behaviour shows. When there are fewer, lower it.
MOST_LINES = 7


def lines_with_private_names() -> Iterator[tuple[str, bool]]:
    """Each with its place, and whether a comment stands on it or right above it."""
    for path in sorted(TESTS.rglob("*.py")):
        if path == Path(__file__):
            continue
        lines = path.read_text().splitlines()
        for number, line in enumerate(lines, 1):
            if PRIVATE.search(line):
                above = lines[number - 2].strip() if number > 1 else ""
                has_reason = bool(REASON.search(line) or REASON.match(above))
                yield f"{path.relative_to(TESTS)}:{number}: {line.strip()}", has_reason


def test_private_names_of_others_are_few() -> None:
    found = [line for line, _ in lines_with_private_names()]
    assert len(found) <= MOST_LINES, "\n".join(found)


def test_each_private_name_has_its_reason() -> None:
    assert [line for line, has_reason in lines_with_private_names() if not has_reason] == []


def test_what_is_private_is_recognised() -> None:
    touching = ["a.b._c", "self.a._b", "self._a._b", "myself._a", "print(s._a)", 'setattr(a, "_b", 1)', "(a, '_b')"]
    honest = ["self._a", "cls._a()", "a.b_c", "a.__class__", "name.endswith('_total')", '"a_b"', "_a(b)"]
    assert [line for line in touching if not PRIVATE.search(line)] == []
    assert [line for line in honest if PRIVATE.search(line)] == []
