"""An instance hangs for longer than its lease, another one is started under its name, and the first one wakes."""

import random
import signal

from tools.bench.chaos.member_faults import signal_group
from tools.bench.chaos.scene import Course, Scene

KIND = "replaced-twin"
# Beyond the lease: whoever starts it anew has seen it dead.
BEYOND_LEASE_S = 1.0
# It is superseded, and finds that out by its next heartbeat (0.1 s); it then gives back what it has.
ENDS_WITHIN_S = 20.0


def replace_by_a_twin(scene: Scene, rng: random.Random) -> Course:
    name = scene.pick_instance(rng)
    if name is None or scene.is_broken(KIND):
        return
    with scene.breaking(KIND, name):
        old = scene.pool.child(name).process
        try:
            signal_group(old.pid, signal.SIGSTOP)
            yield from scene.wait(scene.pool.config.ledger.lease_s + BEYOND_LEASE_S)
            scene.pool.restart(name)
            yield from scene.bring_back(KIND, name)
            signal_group(old.pid, signal.SIGCONT)
            yield from scene.until(lambda: old.poll() is not None, ENDS_WITHIN_S)
            if old.poll() is None:
                sentence = f"the superseded process {old.pid} of {name} still ran {ENDS_WITHIN_S:.0f} s after it woke"
                scene.fail(KIND, sentence)
        finally:
            if old.poll() is None:
                signal_group(old.pid, signal.SIGKILL)  # so that the rest of the run tells of the rest
                old.wait()
