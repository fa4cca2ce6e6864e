"""What the lanes said: a state file of this checkout, by which a run goes on, and the page that is committed."""

import json
import subprocess
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

from tools.nightly.lane import ROOT, Lane, Outcome

PAGE = ROOT / "docs" / "nightly.md"
_HEAD = """# The nightly lanes' last result

`make nightly` writes this page: what takes too long for every change. A second start goes on with the lanes that have
not passed for the same commit. Times are UTC.
"""


class Record:
    """Outcomes by lane, of one commit: those of another do not count."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.commit = current_commit()
        saved = json.loads(path.read_text()) if path.exists() else {}
        kept = saved.get("lanes", {}) if saved.get("commit") == self.commit else {}
        self._outcomes = {name: Outcome(**values) for name, values in kept.items()}

    def has_passed(self, name: str) -> bool:
        return name in self._outcomes and self._outcomes[name].has_passed

    def add(self, lane: Lane, outcome: Outcome) -> None:
        """On the disk at once: a run may be ended between any two lanes."""
        self._outcomes[lane.name] = outcome
        lanes = {name: asdict(kept) for name, kept in self._outcomes.items()}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps({"commit": self.commit, "lanes": lanes}, indent=1))

    def write_page(self, lanes: list[Lane], versions: dict[str, str], machine: str) -> None:
        rows = [self._row(lane) for lane in lanes]
        page = [
            _HEAD,
            f"Commit {self.commit}, on {machine}.\n",
            "| environment | versions |\n|---|---|",
            *(f"| {name} | {found} |" for name, found in versions.items()),
            "\n| lane | result | seconds | at | its last words |\n|---|---|---|---|---|",
            *rows,
            "\n| lane | command |\n|---|---|",
            *(f"| {lane.name} | `{lane.shown_command}` |" for lane in lanes),
        ]
        PAGE.write_text("\n".join(page) + "\n")

    def _row(self, lane: Lane) -> str:
        outcome = self._outcomes.get(lane.name)
        if outcome is None:
            return f"| {lane.name} | not run | | | |"
        words = outcome.last_words.replace("|", "/")
        return f"| {lane.name} | {outcome.result} | {outcome.seconds:.0f} | {outcome.at} | {words} |"


def current_commit() -> str:
    """Short, with a mark of what is changed beside it; the page that this run writes does not count."""
    commit = _git("rev-parse", "--short=12", "HEAD").strip()
    changes = _git("diff", "HEAD", "--", ".", f":!{PAGE.relative_to(ROOT)}")
    return f"{commit} with changes {sha256(changes.encode()).hexdigest()[:8]}" if changes else commit


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout
