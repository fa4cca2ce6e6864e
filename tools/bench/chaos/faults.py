"""Breaks a running pool at random, and puts it together again."""

import random
import time
from collections.abc import Sequence
from contextlib import suppress

from tools.bench.chaos.control_plane_faults import CONTROL_PLANE_FAULTS
from tools.bench.chaos.full_fd_table import fill_fd_table
from tools.bench.chaos.member_faults import MEMBER_FAULTS
from tools.bench.chaos.pool import LEDGER
from tools.bench.chaos.replaced_twin import replace_by_a_twin
from tools.bench.chaos.scene import Course, Scene
from tools.bench.chaos.version_skew import join_with_other_version

KINDS = {
    **MEMBER_FAULTS,
    **CONTROL_PLANE_FAULTS,
    "replaced-twin": replace_by_a_twin,
    "version-skew": join_with_other_version,
    "full-fd-table": fill_fd_table,
}
TICK_S = 0.05
# When nothing new is broken any more, all repairs together take no longer; the longest are starts of parts.
ALL_REPAIRED_WITHIN_S = 300.0


class Faults:
    """`break_something()` and `tick()` from the main thread. Fault number i is drawn from (seed, i) alone."""

    def __init__(self, scene: Scene, kinds: Sequence[str], seed: int) -> None:
        self._scene = scene
        self._kinds = list(kinds)
        self._seed = seed
        self._num_drawn = 0
        self._courses: list[Course] = []
        self.crashed: list[str] = []  # parts that served and ended though nothing was done to them

    def break_something(self) -> None:
        """One of the kinds, if this pool can suffer it now."""
        rng = random.Random(f"{self._seed} {self._num_drawn}")
        self._num_drawn += 1
        if self._kinds:
            self._courses.append(KINDS[rng.choice(self._kinds)](self._scene, rng))
            self.tick()

    def tick(self) -> None:
        for course in list(self._courses):
            try:
                next(course)
            except StopIteration:
                self._courses.remove(course)
        self._notice_crashes()

    def finish(self) -> None:
        """Repair all, and wait for those that leave and those that start."""
        self._scene.is_ending = True
        end_s = time.monotonic() + ALL_REPAIRED_WITHIN_S
        while self._courses and time.monotonic() < end_s:
            self.tick()
            time.sleep(TICK_S)
        for course in self._courses:
            self.crashed.append(f"a fault was not repaired within {ALL_REPAIRED_WITHIN_S:.0f} s: {course!r}")
            with suppress(StopIteration, RuntimeError):
                course.close()  # type: ignore[attr-defined]
        self._courses.clear()

    def _notice_crashes(self) -> None:
        pool, scene = self._scene.pool, self._scene
        if scene.is_broken(LEDGER):
            return  # some end because of it, in their start; they are looked at when it is back
        for name in pool.dead_parts():
            if not scene.is_broken(name):
                if pool.child(name).ready_line() is not None:
                    self.crashed.append(f"{name} ended by itself: {scene.last_words(name)}")
                self._courses.append(self._restart(name))
                next(self._courses[-1], None)

    def _restart(self, name: str) -> Course:
        with self._scene.breaking("ended by itself", name):
            yield
            yield from self._scene.bring_back("ended by itself", name)
