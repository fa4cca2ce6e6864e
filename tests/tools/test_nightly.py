"""`make nightly`: lanes that are commands, outcomes that outlive the run, and a page that says how all stand."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.soon import wait_until
from tools.nightly import record
from tools.nightly.interpreters import supported_minors
from tools.nightly.lane import Lane, run_lane
from tools.nightly.record import Record


def python(code: str, name: str = "kind/one", timeout_s: float = 60) -> Lane:
    return Lane(name, [sys.executable, "-c", code], timeout_s)


def test_a_lane_ends_as_its_command_does_and_keeps_its_output(tmp_path: Path) -> None:
    good = run_lane(python("print('3 passed')"), tmp_path / "logs" / "good")
    assert (good.result, good.has_passed, good.last_words) == ("passed", True, "3 passed")
    bad = run_lane(python("import sys; sys.exit('broken')"), tmp_path / "logs" / "bad")
    assert (bad.result, bad.has_passed, bad.last_words) == ("failed", False, "broken")
    assert (tmp_path / "logs" / "bad").read_text() == "broken\n"


def test_a_lane_past_its_time_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    # Given a command that waits for a child of its own
    code = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, flush=True); child.wait()"
    )
    outcome = run_lane(python(code, timeout_s=5), tmp_path / "log")
    # Then neither of them lives
    assert outcome.result == "timed out"
    state = Path(f"/proc/{(tmp_path / 'log').read_text().strip()}/stat")
    wait_until(lambda: not state.exists() or state.read_text().split()[2] == "Z")


@pytest.fixture
def commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(record, "current_commit", lambda: (tmp_path / "commit").read_text())
    (tmp_path / "commit").write_text("one")


@pytest.mark.usefixtures("commit")
def test_a_second_start_goes_on_with_what_has_not_passed_and_another_commit_starts_anew(tmp_path: Path) -> None:
    # Given a run that was ended after two of three lanes
    first = Record(tmp_path / "state.json")
    for lane in (python("", "a"), python("raise SystemExit(1)", "b")):
        first.add(lane, run_lane(lane, tmp_path / "log"))
    # Then the next start knows what has passed
    again = Record(tmp_path / "state.json")
    assert [again.has_passed(name) for name in "abc"] == [True, False, False]
    # But not for other code
    (tmp_path / "commit").write_text("other")
    assert not Record(tmp_path / "state.json").has_passed("a")


@pytest.mark.usefixtures("commit")
def test_the_page_has_every_lane_with_its_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "PAGE", tmp_path / "page.md")
    kept = Record(tmp_path / "state.json")
    lanes = [python("print('a | b')", "ran"), python("", "waits")]
    kept.add(lanes[0], run_lane(lanes[0], tmp_path / "log"))
    kept.write_page(lanes, {"py999": "Python 9.9.9"}, "a machine")
    page = (tmp_path / "page.md").read_text()
    assert "Commit one, on a machine" in page
    assert "| py999 | Python 9.9.9 |" in page
    assert "| ran | passed |" in page
    assert "a / b" in page
    assert "| waits | not run |" in page


def test_supported_pythons_are_the_classifiers_and_each_has_its_constraints() -> None:
    root = Path(__file__).parents[2]
    assert supported_minors()[0] == "3.11"
    for minor in supported_minors():
        assert (root / "configs" / "constraints" / f"py{minor.replace('.', '')}.txt").is_file()


def test_lanes_are_listed_without_running_any() -> None:
    command = [sys.executable, "-m", "tools.nightly.main", "--list", "chaos"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line.partition(":")[0] for line in listed] == ["chaos/seed 1", "chaos/seed 2", "chaos/seed 3"]
