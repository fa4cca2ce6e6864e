"""`make nightly`: lanes that take too long for every change, one after the other; goes on where the last start ended.

Each lane is a command; its output lies in .nightly/logs. What passed for this commit is not run again. At the end, and
after each lane, docs/nightly.md says how all of them stand. Exit status 0 only if every chosen lane has passed.
"""

import argparse
import platform
import subprocess
import sys
from pathlib import Path

from tools.nightly.interpreters import interpreter_lanes
from tools.nightly.lane import ROOT, Lane, Outcome, run_lane
from tools.nightly.record import Record

KEPT = ROOT / ".nightly"
CHAOS_SEEDS = (1, 2, 3)
_VERSIONS = (
    "import platform; from importlib.metadata import version\n"
    "names = ['torch', 'megatron-core', 'deepspeed', 'transformers', 'numpy']\n"
    "print('Python', platform.python_version() + ',', ', '.join(f'{name} {version(name)}' for name in names))"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lanes", nargs="*", metavar="LANE", help="only lanes whose names begin so")
    parser.add_argument("--list", action="store_true", help="show the lanes and how they stand, run nothing")
    parser.add_argument("--venvs", type=Path, default=KEPT / "venvs", help="environments of other Pythons, kept here")
    parser.add_argument("--chaos-minutes", type=float, default=10.0, help="of each seed")
    args = parser.parse_args()
    lanes = all_lanes(args.venvs.resolve(), args.chaos_minutes)
    chosen = [lane for lane in lanes if not args.lanes or lane.name.startswith(tuple(args.lanes))]
    record = Record(KEPT / "state.json")
    for lane in chosen:
        if args.list or record.has_passed(lane.name):
            print(f"{lane.name}: {'passed' if record.has_passed(lane.name) else 'to do'}")
            continue
        outcome = run(lane, record)
        record.add(lane, outcome)
        print(f"{lane.name}: {outcome.result} ({outcome.seconds:.0f} s) {outcome.last_words}", flush=True)
        record.write_page(lanes, versions(lanes), f"{platform.system()} {platform.machine()}")
    return 0 if args.list or all(record.has_passed(lane.name) for lane in chosen) else 1


def all_lanes(venvs: Path, chaos_minutes: float) -> list[Lane]:
    """A new kind of lane is a line here."""
    return [marked_lane(), *interpreter_lanes(venvs), *chaos_lanes(chaos_minutes)]


def marked_lane() -> Lane:
    """Tests that are too slow for every change."""
    return Lane("tests/marked nightly", [sys.executable, "-m", "pytest", "-q", "--nightly", "-m", "nightly"], 3600)


def chaos_lanes(minutes: float) -> list[Lane]:
    chaos = [sys.executable, "-m", "tools.bench.chaos", "--minutes", f"{minutes:g}"]
    # It settles, and computes every request again, in about the time that it took.
    timeout_s = 600 + 4 * 60 * minutes
    return [Lane(f"chaos/seed {seed}", [*chaos, "--seed", str(seed)], timeout_s) for seed in CHAOS_SEEDS]


def run(lane: Lane, record: Record) -> Outcome:
    if lane.needs is not None and not record.has_passed(lane.needs):
        return Outcome("skipped", last_words=f"{lane.needs} has not passed")
    return run_lane(lane, KEPT / "logs" / f"{lane.name.replace('/', '-').replace(' ', '-')}.log")


def versions(lanes: list[Lane]) -> dict[str, str]:
    """Of each environment that the lanes run in."""
    pythons = dict.fromkeys([sys.executable, *(lane.command[0] for lane in lanes)])
    found = {}
    for python in pythons:
        done = subprocess.run([python, "-c", _VERSIONS], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            found[Path(python).parents[1].name] = done.stdout.strip()
    return found


if __name__ == "__main__":
    sys.exit(main())
