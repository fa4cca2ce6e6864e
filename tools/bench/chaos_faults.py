"""Breaks a running pool at random, and puts it together again."""

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from megatron_distkv.launch.local_cluster import LocalCluster

# At least this many instances stay: a request must have somewhere to go.
NUM_SPARED = 2


@dataclass
class Faults:
    """`maybe_break()` and `repair()` from the main thread, which the children are tied to."""

    cluster: LocalCluster
    rng: random.Random
    counts: Counter[str] = field(default_factory=Counter)
    _due: list[tuple[float, str, Callable[[], None]]] = field(default_factory=list)
    _broken: set[str] = field(default_factory=set)

    def break_something(self) -> None:
        kind = self.rng.choice(
            (self._kill_instance, self._hang_instance, self._kill_ledger, self._hang_ledger, self._kill_gmanager)
        )
        kind()

    def repair(self, *, all_of_it: bool = False) -> None:
        """Carry out the repairs that are due, the ledger's first: nothing starts without it."""
        for item in sorted(self._due, key=lambda item: item[1] != "ledger"):
            due_s, part, repair = item
            if all_of_it or time.monotonic() >= due_s:
                self._due.remove(item)
                repair()
                self._broken.discard(part)
        if "ledger" not in self._broken:
            for name in set(self.cluster.dead_parts()) - self._broken:
                self.cluster.restart(name)  # it could not start while the ledger was away

    # ------------------------------------------------------------------ kinds

    def _kill_instance(self) -> None:
        name = self._pick_instance()
        if name is not None:
            self.cluster.kill(name)
            self._note("kill -9 of an instance", name, self.rng.uniform(0.2, 4.0), lambda: self.cluster.restart(name))

    def _hang_instance(self) -> None:
        """Shorter or longer than its lease."""
        name = self._pick_instance()
        if name is not None:
            pid = self.cluster.child(name).process.pid
            os.killpg(pid, signal.SIGSTOP)
            for_s = self.rng.uniform(0.1, 2.5) * self.cluster.config.ledger.lease_s
            self._note("SIGSTOP of an instance", name, for_s, lambda: os.killpg(pid, signal.SIGCONT))

    def _kill_ledger(self) -> None:
        server = self.cluster.ledger_server
        if server is not None and "ledger" not in self._broken:
            server.kill()
            self._note(
                "kill -9 of the ledger, back empty",
                "ledger",
                self.rng.uniform(0.0, 3.0),
                lambda: server.start() and None,
            )

    def _hang_ledger(self) -> None:
        server = self.cluster.ledger_server
        if server is not None and "ledger" not in self._broken:
            pid = server.pid
            os.kill(pid, signal.SIGSTOP)
            self._note(
                "SIGSTOP of the ledger", "ledger", self.rng.uniform(0.1, 3.0), lambda: os.kill(pid, signal.SIGCONT)
            )

    def _kill_gmanager(self) -> None:
        if "gmanager" not in self._broken:
            self.cluster.kill("gmanager")
            repair_s = self.rng.uniform(0.0, 3.0)
            self._note("kill -9 of the gManager", "gmanager", repair_s, lambda: self.cluster.restart("gmanager"))

    # ------------------------------------------------------------------ inside

    def _pick_instance(self) -> str | None:
        whole = [name for name in self.cluster.instance_ids if name not in self._broken]
        return self.rng.choice(whole) if len(whole) > NUM_SPARED else None

    def _note(self, kind: str, part: str, repair_after_s: float, repair: Callable[[], None]) -> None:
        self.counts[kind] += 1
        self._broken.add(part)
        self._due.append((time.monotonic() + repair_after_s, part, repair))
