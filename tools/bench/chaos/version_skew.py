"""The first member of a rolling upgrade: an instance or a lender that speaks the next version of the protocol."""

import json
import random
import signal
from pathlib import Path

from megatron_distkv.launch.processes import Child

from tools.bench.chaos import seam
from tools.bench.chaos.member_faults import signal_group
from tools.bench.chaos.scene import LEAVES_WITHIN_S, SERVES_WITHIN_S, Course, Scene

KIND = "version-skew"
STAYS_S = 8.0


def join_with_other_version(scene: Scene, rng: random.Random) -> Course:
    """It may be refused, or stay and be left alone: the others and their requests must not suffer."""
    like, stays_s = rng.choice([*scene.pool.instance_ids, *scene.pool.lender_ids]), rng.uniform(2.0, STAYS_S)
    if scene.is_broken(KIND):
        return
    with scene.breaking(KIND, KIND):
        member = _start(scene, like)
        yield from scene.until(lambda: not member.is_running or member.ready_line() is not None, SERVES_WITHIN_S)
        yield from scene.wait(stays_s)
        member.terminate()
        yield from scene.until(lambda: not member.is_running, LEAVES_WITHIN_S)
        if member.is_running and member.ready_line() is not None:  # one that still starts hears of it later
            scene.fail(KIND, f"{member.name} did not end within {LEAVES_WITHIN_S:.0f} s of SIGTERM")
        signal_group(member.process.pid, signal.SIGKILL)
        member.process.wait()


def _start(scene: Scene, like: str) -> Child:
    """With the command and the configuration of the part `like`, but for its name."""
    part = scene.pool.child(like)
    name = f"newer-{scene.counts[KIND]}"
    *command, file = part.command
    config = json.loads(Path(file).read_text())
    key = "lender_id" if "lender_id" in config else "instance_id"
    own = Path(file).with_name(f"{name}.json")
    own.write_text(json.dumps({**config, key: name}))
    changed = seam.environment("tools.bench.chaos.other_version", own.with_suffix(".seam"))
    return Child(name, [*command, str(own)], own.with_suffix(".log"), {**(part.env or {}), **changed})
