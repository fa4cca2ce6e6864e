"""What a pool of N members costs its ledger's server: share of one core, and server time per call.

Drives the project's own RedisLedger against a Valkey of its own, pinned to one core. A *round* is what the pool does in
one heartbeat interval: every member reports and compares what it lends, as instances do, while a gateway reads the
changes 4 times a second and a gManager once. Rounds follow each other as fast as this machine allows, which on few
cores is slower than in life: the share of a core is derived, server CPU of a round / interval, which is what it would
be at the real pace. Time per call is the server's CPU time (schedstat) around the call, so that other work on this
machine does not count.

Checked before anything is reported: the snapshot is exactly what the members reported and borrowed.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

from tqdm import tqdm

from megatron_distkv.ledger import InstanceReport, PoolReader, RequestPlacementEntry
from megatron_distkv.ledger.embedded_server import EmbeddedServer, find_server_binary
from megatron_distkv.ledger.records import heartbeat_interval_s, in_order
from megatron_distkv.ledger.redis_ledger import RedisLedger
from megatron_distkv.rblock import InstanceId, LoanId, new_loan_id
from tools.bench.machine import describe_machine

RBLOCKS, RESERVED, USED = 256, 26, 100
REQUESTS, LOANS_PER_DEBTOR = 16, 2
LEASE_S = 3600.0  # rounds may be slower than in life
CONFIGURED_INTERVAL_S = 0.5
GATEWAY_READS_PER_S, GMANAGER_READS_PER_S = 4, 1
CONNECTIONS = 16
# What instances say of themselves, about as long as it is in life.
INFO = {
    "model": "/models/llama", "requests": "/run/distkv/x.requests.sock", "rblock_size": "64", "vocab_size": "32000",
    "eos_token_ids": "[2]", "rblock_shape": "x" * 220, "query_us": "12.3", "max_context_tokens": "131072",
}  # fmt: skip
_T = TypeVar("_T")


class ServerTime:
    """CPU time of the server, of all and of each kind of call."""

    def __init__(self, pid: int) -> None:
        self._stat, self._schedstat = Path(f"/proc/{pid}/stat"), Path(f"/proc/{pid}/schedstat")
        self.us: dict[str, list[float]] = defaultdict(list)

    def total_s(self) -> float:
        """User and system, all threads."""
        fields = self._stat.read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def of(self, name: str, call: Callable[[], _T]) -> _T:
        before = self._main_thread_ns()
        answer = call()
        self.us[name].append((self._main_thread_ns() - before) / 1000)
        return answer

    def _main_thread_ns(self) -> int:
        return int(self._schedstat.read_text().split()[0])


@dataclass
class Member:
    instance: InstanceId
    epoch: int
    ledger: RedisLedger
    report: InstanceReport = field(default_factory=lambda: InstanceReport(USED))


class Reader:
    """Follows the changes, so often a second of the pool's time."""

    def __init__(self, name: str, ledger: RedisLedger, reads_per_s: int, server: ServerTime) -> None:
        self.pool = PoolReader(lambda since: server.of(f"changes ({name}), a page", lambda: ledger.changes(since)))
        self._interval_s = 1 / reads_per_s
        self._due_at_s = 0.0

    def read_if_due(self, at_s: float) -> None:
        if at_s >= self._due_at_s:
            self._due_at_s += self._interval_s
            self.pool.read()


class Pool:
    """Half of a busy pool's members have borrowed from the other half."""

    def __init__(self, server: EmbeddedServer, num_members: int, is_busy: bool, rng: random.Random) -> None:
        self._rng, self._is_busy, self._at_s = rng, is_busy, 0.0
        self.time = ServerTime(server.pid)
        self.ledgers = [RedisLedger(server.url, "scale", timeout_s=60.0) for _ in range(CONNECTIONS)]
        self.members = [self._join(number) for number in tqdm(range(num_members), "joining", unit="member")]
        self.loans = self._borrow() if is_busy else set()
        gateway = Reader("gateway", self.ledgers[0], GATEWAY_READS_PER_S, self.time)
        self.readers = [gateway, Reader("gManager", self.ledgers[1], GMANAGER_READS_PER_S, self.time)]

    def round(self, interval_s: float) -> None:
        """One interval: all members in a new order, the readers' looks among them."""
        for member in self._rng.sample(self.members, len(self.members)):
            self._beat(member)
            self._at_s += interval_s / len(self.members)
            for reader in self.readers:
                reader.read_if_due(self._at_s)

    def require_right_answers(self) -> None:
        snapshot = self.ledgers[0].snapshot()
        reported = {x.instance: in_order(x.report.placements or ()) for x in self.members}
        is_right = (
            not snapshot.unreadable
            and {x.instance: snapshot.placements.get(x.instance, ()) for x in snapshot.instances} == reported
            and {x.instance: x.local_used for x in snapshot.instances}
            == {x.instance: x.report.local_used_rblocks for x in self.members}
            and {loan.key for loan in snapshot.loans} == self.loans
            and sum(record.lent for record in snapshot.instances) == len(self.loans)
        )
        for reader in self.readers:
            reader.pool.read()
            is_right = is_right and {name: x.placements for name, x in reader.pool.members.items()} == reported
        if not is_right:
            raise SystemExit("the ledger's answers are wrong: nothing to report")

    def ask_for_the_rest(self, times: int) -> None:
        """What members ask for now and then, one at a time."""
        for number in range(times):
            half = len(self.members) // 2
            self._ask(number, self._rng.choice(self.members[:half]), self._rng.choice(self.members[half:]))

    def _ask(self, number: int, debtor: Member, creditor: Member) -> None:
        time_of, ledger, last = self.time.of, debtor.ledger, len(self.members) - 64
        loan = new_loan_id(debtor.instance, debtor.epoch, 10**6 + number)
        terms = (loan, debtor.instance, debtor.epoch, creditor.instance, creditor.epoch, 1, LEASE_S)
        time_of("(a ping, to compare)", ledger.ping_or_explain)
        time_of("recommend 64", lambda: ledger.recommend(debtor.instance, 64))
        time_of("recommend 64, the last page", lambda: ledger.recommend(debtor.instance, 64, last))
        refusal = time_of("borrow", lambda: ledger.borrow(*terms))
        assert refusal is None, refusal
        time_of("accept", lambda: ledger.accept(loan, creditor.instance, creditor.epoch))
        time_of("known_loans of 100", lambda: ledger.known_loans([loan, *(LoanId(f"x{n}") for n in range(99))]))
        time_of("release", lambda: ledger.release(loan, debtor.instance, debtor.epoch))
        time_of("changes since 0, a page", lambda: ledger.changes(0))

    def close(self) -> None:
        for ledger in self.ledgers:
            ledger.close()

    def _join(self, number: int) -> Member:
        name, ledger = InstanceId(f"instance-{number}"), self.ledgers[number % CONNECTIONS]
        address = f"unix:/run/distkv/{name}.{{rank}}.sock host:abc ranks:1"
        registered = self.time.of(
            "register", lambda: ledger.register(name, address, RBLOCKS, RESERVED, LEASE_S, info=INFO)
        )  # fmt: skip
        return Member(name, registered.epoch, ledger)

    def _borrow(self) -> set[LoanId]:
        half, loans = len(self.members) // 2, set()
        for debtor in self.members[:half]:
            for number in range(LOANS_PER_DEBTOR):
                creditor = self._rng.choice(self.members[half:])
                loan = new_loan_id(debtor.instance, debtor.epoch, number)
                terms = (loan, debtor.instance, debtor.epoch, creditor.instance, creditor.epoch, 1, LEASE_S)
                if debtor.ledger.borrow(*terms) is None:
                    creditor.ledger.accept(loan, creditor.instance, creditor.epoch)
                    loans.add(loan)
        return loans

    def _beat(self, member: Member) -> None:
        """As Membership does, and Lending with what it is answered."""
        told = member.report
        if self._is_busy:
            member.report = self._new_report(member.instance)
        is_new = member.report != told
        report = member.report if is_new else InstanceReport(told.local_used_rblocks, num_running=told.num_running)
        reply = self.time.of(
            "heartbeat, placements changed" if is_new else "heartbeat, nothing changed",
            lambda: member.ledger.heartbeat(member.instance, member.epoch, report, LEASE_S),
        )
        assert reply.known
        if reply.lent:
            self.time.of("loans_of", lambda: member.ledger.loans_of(member.instance, member.epoch))

    def _new_report(self, name: InstanceId) -> InstanceReport:
        placed = tuple(
            RequestPlacementEntry(f"req-{name}-{n}", name, self._rng.randint(2, 9), True) for n in range(REQUESTS)
        )
        return InstanceReport(self._rng.randint(90, USED), placements=placed, num_running=REQUESTS)


class Result(NamedTuple):
    interval_s: float
    share: float  # of one core
    rounds: int
    wall_s: float
    us: dict[str, list[float]]


def measure(num_members: int, is_busy: bool, seconds: float, seed: int, core: int) -> Result:
    with EmbeddedServer() as server:
        os.sched_setaffinity(server.pid, {core})
        pool = Pool(server, num_members, is_busy, random.Random(seed))
        interval_s = max(CONFIGURED_INTERVAL_S, heartbeat_interval_s(num_members))
        pool.round(interval_s)  # warm-up: scripts, memory, the readers' whole read
        pool.require_right_answers()
        pool.time.us.clear()
        rounds, began_s, cpu_s = 0, time.perf_counter(), pool.time.total_s()
        while time.perf_counter() - began_s < seconds:
            pool.round(interval_s)
            rounds += 1
        wall_s, cpu_s = time.perf_counter() - began_s, pool.time.total_s() - cpu_s
        pool.require_right_answers()
        pool.ask_for_the_rest(20)
        pool.close()
        return Result(interval_s, cpu_s / (rounds * interval_s), rounds, wall_s, pool.time.us)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=1000)
    parser.add_argument("--busy", action="store_true", help=f"{REQUESTS} placements change with each heartbeat, loans")
    parser.add_argument("--seconds", type=float, default=20.0, help="at least so long, after a warm-up")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--core", type=int, default=0, help="the server's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the report there")
    args = parser.parse_args()
    print(describe_machine())
    print(f"{_server_version()}; " + ", ".join(f"{name} {value}" for name, value in vars(args).items()))
    results = [measure(args.members, args.busy, args.seconds, args.seed + run, args.core) for run in range(args.runs)]
    shares = sorted(result.share for result in results)
    print(
        f"{args.members} members, {'busy' if args.busy else 'idle'}, an interval of {results[0].interval_s:g} s: ",
        end="",
    )
    print(f"{100 * statistics.median(shares):.1f} % of a core (runs {', '.join(f'{100 * x:.1f}' for x in shares)})")
    paces = [result.rounds * result.interval_s / result.wall_s for result in results]
    print(f"derived from rounds at {min(paces):.2f} to {max(paces):.2f} of the real pace")
    print(f"{'server CPU per call, us':<36}{'median':>8}{'max':>8}{'calls':>8}")
    for name in sorted({name for result in results for name in result.us}):
        times = [us for result in results for us in result.us.get(name, [])]
        print(f"{name:<36}{statistics.median(times):>8.0f}{max(times):>8.0f}{len(times):>8}")
    if args.json is not None:
        args.json.write_text(json.dumps([result._asdict() for result in results]))


def _server_version() -> str:
    binary = find_server_binary()
    said = subprocess.run([str(binary), "--version"], capture_output=True, text=True, check=True).stdout
    return said.split(" sha")[0]


if __name__ == "__main__":
    main()
