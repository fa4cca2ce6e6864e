"""The ledger: killed and back empty, hung, flushed, slow."""

import os
import random
import signal
from collections.abc import Callable

import redis

from tools.bench.chaos.pool import LEDGER
from tools.bench.chaos.scene import Course, Scene

# At most, in seconds.
AWAY_S, HANGS_S, IS_SLOW_FOR_S = 3.0, 3.0, 8.0
# One way. A round trip to another continent takes 0.3 s.
SLOW_LINE_S = (0.01, 0.15)


def _kill_ledger(scene: Scene, rng: random.Random) -> Course:
    away_s = rng.uniform(0.0, AWAY_S)
    if not scene.is_broken(LEDGER):
        with scene.breaking("kill-ledger", LEDGER):
            scene.pool.server.kill()
            yield from scene.wait(away_s)
            scene.pool.server.start()


def _hang_ledger(scene: Scene, rng: random.Random) -> Course:
    for_s = rng.uniform(0.1, HANGS_S)
    if not scene.is_broken(LEDGER):
        with scene.breaking("hang-ledger", LEDGER):
            os.kill(scene.pool.server.pid, signal.SIGSTOP)
            yield from scene.wait(for_s)
            os.kill(scene.pool.server.pid, signal.SIGCONT)


def _flush_ledger(scene: Scene, _: random.Random) -> Course:
    if not scene.is_broken(LEDGER):
        with scene.breaking("flush-ledger", LEDGER), redis.Redis.from_url(scene.pool.server.url) as client:
            client.flushall()
            yield


def _slow_ledger(scene: Scene, rng: random.Random) -> Course:
    """Members start and leave all the same: the ledger is not broken, only far away."""
    one_way_s, for_s = rng.uniform(*SLOW_LINE_S), rng.uniform(1.0, IS_SLOW_FOR_S)
    if not scene.is_broken("line"):
        with scene.breaking("slow-ledger", "line"):
            scene.pool.line.delay(one_way_s)
            yield from scene.wait(for_s)
            scene.pool.line.delay(0.0)


CONTROL_PLANE_FAULTS: dict[str, Callable[[Scene, random.Random], Course]] = {
    "kill-ledger": _kill_ledger,
    "hang-ledger": _hang_ledger,
    "flush-ledger": _flush_ledger,
    "slow-ledger": _slow_ledger,
}
