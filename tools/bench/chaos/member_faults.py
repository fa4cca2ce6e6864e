"""Instances, memory-only lenders and gateways: killed, hung, sent away."""

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress

from megatron_distkv.cli.pool_arguments import LEDGER_VARIABLE
from tools.bench.chaos.pool import GMANAGER, LEDGER
from tools.bench.chaos.scene import LEAVES_WITHIN_S, Course, Scene

# How long a part stays away after a kill -9, and how long an instance may take for a drain: at most, in seconds.
AWAY_S, DRAINS_WITHIN_S = 4.0, 6.0


def kill(scene: Scene, rng: random.Random, kind: str, part: str | None) -> Course:
    away_s = rng.uniform(0.2, AWAY_S)
    if part is not None:
        with scene.breaking(kind, part):
            scene.pool.kill(part)
            yield from scene.wait(away_s)
            yield from scene.bring_back(kind, part)


def hang(scene: Scene, rng: random.Random, kind: str, part: str | None) -> Course:
    """Shorter or longer than its lease."""
    for_s = rng.uniform(0.1, 2.5) * scene.pool.config.ledger.lease_s
    if part is not None:
        with scene.breaking(kind, part):
            pid = scene.pool.child(part).process.pid
            signal_group(pid, signal.SIGSTOP)
            yield from scene.wait(for_s)
            signal_group(pid, signal.SIGCONT)


def signal_group(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(pid, number)


def _kill_instance(scene: Scene, rng: random.Random) -> Course:
    return kill(scene, rng, "kill-instance", scene.pick_instance(rng))


def _hang_instance(scene: Scene, rng: random.Random) -> Course:
    return hang(scene, rng, "hang-instance", scene.pick_instance(rng))


def _drain_instance(scene: Scene, rng: random.Random) -> Course:
    """Another one joins under its name when it has left."""
    name, within_s = scene.pick_instance(rng), rng.uniform(0.0, DRAINS_WITHIN_S)
    if name is None or scene.is_broken(LEDGER):
        return
    with scene.breaking("drain-instance", name):
        command = [sys.executable, "-m", "megatron_distkv.cli.main", "drain", name, "--within", str(within_s)]
        leaving = scene.pool.child(name).process  # ends a little later than the command, or without it
        draining = subprocess.Popen(
            [*command, "--pool", scene.pool.config.ledger.pool],
            env={**os.environ, LEDGER_VARIABLE: scene.pool.cluster.ledger_url},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        yield from scene.until(lambda: leaving.poll() is not None, within_s + LEAVES_WITHIN_S)
        yield from scene.until(lambda: draining.poll() is not None, LEAVES_WITHIN_S)
        draining.kill()
        draining.wait()
        if leaving.poll() is not None:  # the ledger may have gone away before it could be told
            yield from scene.bring_back("drain-instance", name)


def _kill_lender(scene: Scene, rng: random.Random) -> Course:
    return kill(scene, rng, "kill-lender", scene.pick(rng, scene.pool.lender_ids))


def _hang_lender(scene: Scene, rng: random.Random) -> Course:
    return hang(scene, rng, "hang-lender", scene.pick(rng, scene.pool.lender_ids))


def _drain_lender(scene: Scene, rng: random.Random) -> Course:
    name, away_s = scene.pick(rng, scene.pool.lender_ids), rng.uniform(0.0, AWAY_S)
    if name is None:
        return
    with scene.breaking("drain-lender", name):
        leaving = scene.pool.child(name).process
        leaving.terminate()
        yield from scene.until(lambda: leaving.poll() is not None, LEAVES_WITHIN_S)
        if leaving.poll() is None:
            scene.fail("drain-lender", f"{name} did not end within {LEAVES_WITHIN_S:.0f} s of SIGTERM")
            scene.pool.kill(name)
        yield from scene.wait(away_s)
        yield from scene.bring_back("drain-lender", name)


def _kill_gmanager(scene: Scene, rng: random.Random) -> Course:
    return kill(scene, rng, "kill-gmanager", scene.pick(rng, [GMANAGER]))


def _hang_gmanager(scene: Scene, rng: random.Random) -> Course:
    return hang(scene, rng, "hang-gmanager", scene.pick(rng, [GMANAGER]))


def _kill_gateway(scene: Scene, rng: random.Random) -> Course:
    """Its clients ask the other one."""
    name = scene.pick_gateway(rng)
    if name is not None:
        scene.gateways.note_killed(name)
        yield from kill(scene, rng, "kill-gateway", name)
        scene.gateways.note_back(name)


MEMBER_FAULTS: dict[str, Callable[[Scene, random.Random], Course]] = {
    "kill-instance": _kill_instance,
    "hang-instance": _hang_instance,
    "drain-instance": _drain_instance,
    "kill-lender": _kill_lender,
    "hang-lender": _hang_lender,
    "drain-lender": _drain_lender,
    "kill-gmanager": _kill_gmanager,
    "hang-gmanager": _hang_gmanager,
    "kill-gateway": _kill_gateway,
}
