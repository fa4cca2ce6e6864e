"""Breaks a running pool at random, and puts it together again."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import redis
from megatron_distkv.launch.local_cluster import LocalCluster

from megatron_distkv.cli.pool_arguments import LEDGER_VARIABLE

# At least this many instances serve: a request must have somewhere to go.
NUM_SPARED = 2
LEDGER, GMANAGER = "ledger", "gmanager"
# A part told to leave has ended by then, or is taken for one that stays.
LEAVES_WITHIN_S = 30.0


@dataclass
class Repair:
    """Of one part, when its time has come and, for one that was told to leave, when it has left."""

    part: str
    due_s: float
    carry_out: Callable[[], None]
    leaving: "subprocess.Popen[bytes] | None" = None

    def is_due(self, *, now: bool) -> bool:
        late = time.monotonic() > self.due_s + LEAVES_WITHIN_S
        has_left = self.leaving is None or self.leaving.poll() is not None
        return (has_left and (now or time.monotonic() >= self.due_s)) or late


@dataclass
class Faults:
    """`break_something()` and `repair()` from the main thread, which the children are tied to."""

    cluster: LocalCluster
    rng: random.Random
    counts: Counter[str] = field(default_factory=Counter)
    _repairs: list[Repair] = field(default_factory=list)
    crashed: list[str] = field(default_factory=list)  # parts that served and ended though nothing was done to them
    _broken: set[str] = field(default_factory=set)
    _ended: set[str] = field(default_factory=set)  # parts that were killed or sent away and have not come back yet
    _drains: "list[subprocess.Popen[bytes]]" = field(default_factory=list)

    def break_something(self) -> None:
        """One of the kinds that this pool can suffer now."""
        kinds = [self._kill_instance, self._hang_instance, self._drain_instance]
        if self.cluster.lender_ids:
            kinds += [self._kill_lender, self._hang_lender, self._send_lender_away]
        kinds += [self._kill_ledger, self._hang_ledger, self._flush_ledger, self._kill_gmanager, self._hang_gmanager]
        self.rng.choice(kinds)()

    def repair(self, *, now: bool = False) -> None:
        """Carry out the repairs that are due, the ledger's first: nothing starts without it."""
        for repair in sorted(self._repairs, key=lambda repair: repair.part != LEDGER):
            if repair.is_due(now=now):
                self._repairs.remove(repair)
                repair.carry_out()
                self._broken.discard(repair.part)
        if LEDGER not in self._broken:
            for name in set(self.cluster.dead_parts()) - self._broken:
                self._bring_back(name)

    def _bring_back(self, name: str) -> None:
        child = self.cluster.child(name)
        if name not in self._ended and child.ready_line() is not None:
            self.crashed.append(f"{name} ended by itself: {child.error_line()}")
        self._ended.discard(name)
        self.cluster.restart(name)  # it has ended, or could not start while the ledger was away

    def finish(self) -> None:
        """Repair all, and wait for those that leave."""
        while self._repairs:
            self.repair(now=True)
            time.sleep(0.05)
        self.repair()
        for draining in self._drains:
            draining.wait(LEAVES_WITHIN_S)

    # ------------------------------------------------------------------ instances and lenders

    def _kill_instance(self) -> None:
        self._kill("an instance", self._pick_instance())

    def _hang_instance(self) -> None:
        self._hang("an instance", self._pick_instance())

    def _drain_instance(self) -> None:
        """Another one joins under its name when it has left."""
        name = self._pick_instance()
        if name is not None and LEDGER not in self._broken:
            within_s = self.rng.uniform(0.0, 6.0)
            command = [sys.executable, "-m", "megatron_distkv.cli.main", "drain", name, "--within", str(within_s)]
            leaving = self.cluster.child(name).process  # ends a little later than the command, or without it
            draining = subprocess.Popen(
                [*command, "--pool", self.cluster.config.ledger.pool],
                env={**os.environ, LEDGER_VARIABLE: self.cluster.ledger_url},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            self._drains.append(draining)
            self._note("drain of an instance, another joins", name, within_s, lambda: None, leaving)

    def _kill_lender(self) -> None:
        self._kill("a lender", self._pick(self.cluster.lender_ids))

    def _hang_lender(self) -> None:
        self._hang("a lender", self._pick(self.cluster.lender_ids))

    def _send_lender_away(self) -> None:
        name = self._pick(self.cluster.lender_ids)
        if name is not None:
            process = self.cluster.child(name).process
            process.terminate()
            self._note("drain of a lender, another joins", name, self.rng.uniform(0.0, 4.0), lambda: None, process)

    # ------------------------------------------------------------------ the control plane

    def _kill_ledger(self) -> None:
        server = self.cluster.ledger_server
        if server is not None and LEDGER not in self._broken:
            server.kill()
            back_s = self.rng.uniform(0.0, 3.0)
            self._note("kill -9 of the ledger, back empty", LEDGER, back_s, lambda: server.start() and None)

    def _hang_ledger(self) -> None:
        server = self.cluster.ledger_server
        if server is not None and LEDGER not in self._broken:
            self._stop_for("SIGSTOP of the ledger", LEDGER, self.rng.uniform(0.1, 3.0), os.kill, server.pid)

    def _flush_ledger(self) -> None:
        if LEDGER not in self._broken:
            with redis.Redis.from_url(self.cluster.ledger_url) as client:
                client.flushall()
            self.counts["FLUSHALL of the ledger"] += 1

    def _kill_gmanager(self) -> None:
        self._kill("the gManager", self._pick([GMANAGER]))

    def _hang_gmanager(self) -> None:
        self._hang("the gManager", self._pick([GMANAGER]))

    # ------------------------------------------------------------------ inside

    def _pick_instance(self) -> str | None:
        whole = self._whole(self.cluster.instance_ids)
        return self.rng.choice(whole) if len(whole) > NUM_SPARED else None

    def _pick(self, names: list[str]) -> str | None:
        whole = self._whole(names)
        return self.rng.choice(whole) if whole else None

    def _whole(self, names: list[str]) -> list[str]:
        """Those that serve: one that is started again may take a while on a busy machine."""
        return [x for x in names if x not in self._broken and self._serves(x)]

    def _serves(self, name: str) -> bool:
        child = self.cluster.child(name)
        return child.is_running and child.ready_line() is not None

    def _kill(self, what: str, name: str | None) -> None:
        if name is not None:
            self.cluster.kill(name)
            self._ended.add(name)
            self._note(f"kill -9 of {what}", name, self.rng.uniform(0.2, 4.0), lambda: None)

    def _hang(self, what: str, name: str | None) -> None:
        """Shorter or longer than its lease."""
        if name is not None:
            for_s = self.rng.uniform(0.1, 2.5) * self.cluster.config.ledger.lease_s
            self._stop_for(f"SIGSTOP of {what}", name, for_s, os.killpg, self.cluster.child(name).process.pid)

    def _stop_for(self, kind: str, part: str, for_s: float, send: Callable[[int, int], None], pid: int) -> None:
        def go_on() -> None:
            with contextlib.suppress(ProcessLookupError):
                send(pid, signal.SIGCONT)

        with contextlib.suppress(ProcessLookupError):
            send(pid, signal.SIGSTOP)
        self._note(kind, part, for_s, go_on)

    def _note(
        self, kind: str, part: str, repair_after_s: float, carry_out: Callable[[], None],
        leaving: "subprocess.Popen[bytes] | None" = None,
    ) -> None:  # fmt: skip
        self.counts[kind] += 1
        self._broken.add(part)
        if leaving is not None:
            self._ended.add(part)
        self._repairs.append(Repair(part, time.monotonic() + repair_after_s, carry_out, leaving))
