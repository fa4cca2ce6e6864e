"""Steps 2 and 3 of the demo: a pool of small instances, long prompts, and short ones arriving all the time.

Step 5: the longest prompt again, for one such instance alone.
"""

import shutil
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from megatron_distkv.launch.evaluate import ANSWER_TOKENS, PasskeyResult, ask, openai_client
from megatron_distkv.launch.local_cluster import LocalCluster
from tqdm import tqdm

from megatron_distkv.config.cluster import ClusterConfig
from megatron_distkv.ledger import DebtLedger, PoolSnapshot
from megatron_distkv.training.passkey import Prompt, load_prose, prompts

DEPTHS = (0.1, 0.5, 0.9)
SEED = 7
SHORT_TOKENS = 60
# A pause between two short requests of one instance: they are company, not the load that is measured.
SHORT_PAUSE_S = 0.3
# rBlocks that the longest prompt leaves free in the whole pool, for the short requests.
SPARE_RBLOCKS = 6
SAMPLE_INTERVAL_S = 0.02


class Capacity(NamedTuple):
    """Tokens of KV: of one instance alone, and of one request that borrows all it may."""

    own: int
    longest: int


@dataclass
class Observation:
    """What the clients and the ledger showed."""

    asked: list[tuple[int, float, Prompt]]
    results: list[PasskeyResult]
    fullest: PoolSnapshot
    at_end: PoolSnapshot
    num_short: int
    num_short_wrong: int


def capacity_tokens(config: ClusterConfig) -> Capacity:
    cache = config.kv_cache
    lendable = int(cache.num_rblocks * config.lending.lendable_fraction)
    rblocks = cache.num_rblocks + (config.instances - 1) * lendable
    return Capacity(cache.num_rblocks * cache.rblock_size, rblocks * cache.rblock_size)


def context_lengths(config: ClusterConfig) -> list[int]:
    """From a tenth of one pool to nearly all pools together."""
    own, longest = capacity_tokens(config)
    most = longest - SPARE_RBLOCKS * config.kv_cache.rblock_size - ANSWER_TOKENS
    between = [own + (most - own) * part // 3 for part in (1, 2)]
    return sorted({own // 10, own // 2, own - 2 * ANSWER_TOKENS, *between, most})


def serve_and_ask(config: ClusterConfig, text: Path | None, output: Path) -> Observation:
    prose = load_prose(text).held_out
    asked = prompts(SEED, prose, context_lengths(config), DEPTHS)
    short = prompts(SEED + 1, prose, [SHORT_TOKENS], [0.5] * config.instances)
    print(f"\n2. starting the ledger, the gManager, {config.instances} instances (deepspeed jobs) and the gateway")
    with LocalCluster(config) as cluster, ExitStack() as stack:
        stack.callback(_keep_logs, cluster.run_dir, output / "logs")
        client = stack.enter_context(openai_client(cluster.base_url))
        watch = stack.enter_context(LedgerWatch(cluster.ledger))
        company = stack.enter_context(
            ShortRequests(client, config, dict(zip(cluster.instance_ids, short, strict=True)))
        )
        print(f"3. asking {len(asked)} passkeys over HTTP at {cluster.base_url}")
        results = [ask(client, config.served_model_name, *one) for one in tqdm(asked, "asking", unit="prompt")]
        company.stop()
        at_end = _settled(cluster.ledger, config)
        return Observation(asked, results, watch.fullest, at_end, company.num_done, company.num_wrong)


def refusal_alone(config: ClusterConfig, asked: list[tuple[int, float, Prompt]]) -> str | None:
    """What one instance without a pool says to the longest prompt; None: it answers."""
    from openai import BadRequestError

    longest = max(asked, key=lambda one: one[0])
    with LocalCluster(config.model_copy(update={"instances": 1})) as cluster, openai_client(cluster.base_url) as client:
        try:
            ask(client, config.served_model_name, *longest)
        except BadRequestError as error:
            return str(error.body["message"] if isinstance(error.body, dict) else error)
    return None


class LedgerWatch:
    """Keeps the snapshot with most rBlocks on loan."""

    def __init__(self, ledger: DebtLedger) -> None:
        self._ledger = ledger
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.fullest = ledger.snapshot()

    def __enter__(self) -> "LedgerWatch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(SAMPLE_INTERVAL_S):
            now = self._ledger.snapshot()
            if _num_lent(now) > _num_lent(self.fullest):
                self.fullest = now


@dataclass
class ShortRequests:
    """One client per instance that asks the same short prompt again and again."""

    client: Any
    config: ClusterConfig
    prompts: dict[str, tuple[int, float, Prompt]]
    num_done: int = 0
    num_wrong: int = 0
    _first: dict[str, list[int]] = field(default_factory=dict)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._is_over = threading.Event()
        self._lock = threading.Lock()

    def __enter__(self) -> "ShortRequests":
        """The first answers come from instances that lend nothing yet: what all later ones must equal."""
        for name, prompt in self.prompts.items():
            self._first[name] = self._ask(name, prompt)
        self._threads = [threading.Thread(target=self._run, args=(name,), daemon=True) for name in self.prompts]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, name: str, prompt: tuple[int, float, Prompt]) -> list[int]:
        return ask(self.client, self.config.served_model_name, *prompt, instance=name).token_ids

    def _run(self, name: str) -> None:
        while not self._is_over.wait(SHORT_PAUSE_S):
            tokens = self._ask(name, self.prompts[name])
            with self._lock:
                self.num_done += 1
                self.num_wrong += tokens != self._first[name]


def _num_lent(snapshot: PoolSnapshot) -> int:
    return sum(loan.num_rblocks for loan in snapshot.loans)


def _settled(ledger: DebtLedger, config: ClusterConfig) -> PoolSnapshot:
    """The ledger after two heartbeats without requests."""
    time.sleep(2 * config.ledger.heartbeat_interval_s)
    return ledger.snapshot()


def _keep_logs(run_dir: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for log in run_dir.glob("*.log"):
        shutil.copy(log, target)
