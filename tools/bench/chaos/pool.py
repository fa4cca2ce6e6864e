"""The pool that suffers: a LocalCluster, its ledger behind a line that can be slow, and a second gateway."""

import os
import signal
import time
from contextlib import ExitStack, suppress
from pathlib import Path

from megatron_distkv.launch.commands import command_line, free_port
from megatron_distkv.launch.local_cluster import LocalCluster
from megatron_distkv.launch.processes import Child

from megatron_distkv.cli.pool_arguments import LEDGER_VARIABLE
from megatron_distkv.config.cluster import ClusterConfig
from megatron_distkv.ledger.embedded_server import EmbeddedServer
from tools.bench.chaos.ledger_line import LedgerLine

NUM_RBLOCKS, RBLOCK_SIZE = 24, 8
LEDGER, LINE, GMANAGER, GATEWAY, SECOND_GATEWAY = "ledger", "line", "gmanager", "gateway", "gateway-1"
# All parts serve by then, also on a machine with much other work.
STARTS_WITHIN_S = 600.0


class Pool:
    """`with Pool(...) as pool:`. The parts by their names, wherever they were started. From the main thread only."""

    def __init__(self, model: Path, instances: int, lenders: int, kv_cache_dtype: str, scratch: Path) -> None:
        self._scratch = scratch
        self.server = EmbeddedServer()
        self.line = LedgerLine(scratch / "line.sock", self.server.url)
        self.config = ClusterConfig.model_validate(
            {
                "model": model, "instances": instances, "launcher": "python", "port": free_port(),
                "start_timeout_s": STARTS_WITHIN_S,
                "lenders": lenders, "lender_rblocks": NUM_RBLOCKS,
                "kv_cache": {"num_rblocks": NUM_RBLOCKS, "rblock_size": RBLOCK_SIZE, "dtype": kv_cache_dtype},
                "scheduler": {"max_batched_tokens": 64},
                "ledger": {"url": self.line.url, "heartbeat_interval_s": 0.1, "lease_s": 3.0},
                "lending": {"deadline_s": 2.0},
            }
        )  # fmt: skip
        self.cluster = LocalCluster(self.config)
        self._second_port = free_port()  # always the same, as that of the first
        self._stack = ExitStack()

    def __enter__(self) -> "Pool":
        with ExitStack() as stack:
            stack.enter_context(self.server)
            stack.enter_context(self.line)
            stack.enter_context(self.cluster)
            self._second = self._start_second_gateway()
            stack.callback(lambda: self._second.end())
            stack.callback(lambda: self._second.terminate())
            self.wait_for([SECOND_GATEWAY])
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def instance_ids(self) -> list[str]:
        return self.cluster.instance_ids

    @property
    def lender_ids(self) -> list[str]:
        return self.cluster.lender_ids

    @property
    def gateways(self) -> dict[str, str]:
        """Their base URLs by their names."""
        second = self.child(SECOND_GATEWAY).ready_line() or ""
        return {GATEWAY: self.cluster.base_url, SECOND_GATEWAY: second.split()[-1]}

    @property
    def parts(self) -> list[str]:
        """All that `child` knows."""
        return [*self.instance_ids, *self.lender_ids, GMANAGER, GATEWAY, SECOND_GATEWAY]

    @property
    def pids(self) -> dict[str, int]:
        """Of what serves now, the ledger server and the line to it included. Any thread may ask.

        Not of what still starts: its libraries come, request after request of others, and would look like a leak.
        """
        children = {name: self.child(name) for name in self.parts}
        running = {
            name: child.process.pid
            for name, child in children.items()
            if child.is_running and child.ready_line() is not None
        }
        with suppress(RuntimeError):  # the ledger is away
            running[LEDGER] = self.server.pid
        return {**running, LINE: self.line.pid}

    def child(self, name: str) -> Child:
        return self._second if name == SECOND_GATEWAY else self.cluster.child(name)

    def serves(self, name: str) -> bool:
        return self.child(name).is_running and self.child(name).ready_line() is not None

    def kill(self, name: str) -> None:
        """kill -9 of a part and all its processes."""
        os.killpg(self.child(name).process.pid, signal.SIGKILL)
        self.child(name).process.wait()

    def restart(self, name: str) -> None:
        if name == SECOND_GATEWAY:
            self._second = self._start_second_gateway()
        else:
            self.cluster.restart(name)

    def dead_parts(self) -> list[str]:
        return [name for name in self.parts if not self.child(name).is_running]

    def wait_for(self, names: list[str]) -> None:
        """Raises UserError for one that did not start."""
        of_cluster = [name for name in names if name != SECOND_GATEWAY]
        if of_cluster:
            self.cluster.wait_for(of_cluster)
        end_s = time.monotonic() + STARTS_WITHIN_S
        while SECOND_GATEWAY in names and not self.serves(SECOND_GATEWAY):
            if not self._second.is_running or time.monotonic() > end_s:
                raise RuntimeError(f"{SECOND_GATEWAY} did not start: {self._second.error_line()}")
            time.sleep(0.05)

    def _start_second_gateway(self) -> Child:
        config = self.config
        command = command_line(
            "gateway", "--pool", config.ledger.pool, "--port", str(self._second_port),
            "--served-model-name", config.served_model_name,
        )  # fmt: skip
        env = {"PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1", LEDGER_VARIABLE: self.cluster.ledger_url}
        return Child(SECOND_GATEWAY, command, self._scratch / f"{SECOND_GATEWAY}.log", env)
