"""A pool whose parts are killed, hung and restarted at random, for a short while; and what such a run must see."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

SEED, MINUTES = 20, "1"  # of traffic and faults; times still differ between runs


class Done(NamedTuple):
    report: dict[str, Any]
    said: str
    exit_status: int


def chaos(file: Path, *options: str) -> Done:
    command = [sys.executable, "-m", "tools.bench.chaos", *options, "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert file.exists(), done.stderr[-3000:]
    return Done(json.loads(file.read_text()), done.stdout, done.returncode)


@pytest.mark.timeout(900)
def test_a_while_of_chaos_loses_and_leaks_nothing(tmp_path: Path) -> None:
    report, said, exit_status = chaos(tmp_path / "report.json", "--minutes", MINUTES, "--seed", str(SEED))
    assert (report["lost"], report["mismatches"], report["leaks"], report["failures"]) == (0, 0, [], []), report
    assert report["requests"] > 10
    assert report["logprobs"] > 100
    assert report["lives_judged"] > 0
    assert len(report["faults"]) >= 4
    assert "| 20 | 1 |" in said
    assert exit_status == 0


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_a_mebibyte_and_a_file_kept_per_request_make_it_fail(tmp_path: Path) -> None:
    quiet = (
        "--minutes",
        "0.7",
        "--min-requests",
        "80",
        "--seed",
        "1",
        "--instances",
        "2",
        "--lenders",
        "0",
        "--faults",
        "none",
    )
    report, said, exit_status = chaos(tmp_path / "report.json", *quiet, "--inject", "tools.bench.chaos.leak")
    assert exit_status == 1
    assert report["leaks"], report
    for instance in ("instance-0", "instance-1"):
        assert f"{instance} keeps about " in said, report  # about 1.0: requests under way blur it
    assert all("MiB and" in sentence and "files per request" in sentence for sentence in report["leaks"])
    assert (report["lost"], report["mismatches"]) == (0, 0)


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_partials_that_are_a_little_too_great_make_it_fail(tmp_path: Path) -> None:
    """By 1.0002: most tokens stay what they are, their log-probabilities do not."""
    quiet = ("--minutes", "0.4", "--seed", "1", "--instances", "2", "--lenders", "0", "--faults", "none")
    report, said, exit_status = chaos(tmp_path / "report.json", *quiet, "--inject", "tools.bench.chaos.scaled_partials")
    assert exit_status == 1
    assert report["differences"]["logprobs"] > 0
    assert report["greatest_logprob_error"] > report["logprob_tolerance"]
    assert f"{report['mismatches']} of {report['answers']} answers differ" in said
    assert report["leaks"] == []
